"""Which neurons of a feed-forward network go together.

Clustering by input weights is MoEfication's (Zhang et al. 2021, arXiv 2110.01786, section 3.2, "parameter clustering
split"): balanced k-means on the normalised rows of the first matrix, so that neurons that fire on the same inputs
share an expert. Of a gated network the rows are those of the gate, which decides whether a neuron fires.

Legend: F neurons, N of them routed, D model width, G shards, W = N / G.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.nn import functional

from crossways.rules.select.base_layer import balanced_assignment
from crossways.surgery.upcycle.ffn import DenseFFN
from crossways.surgery.upcycle.settings import Neurons

ROUNDS = 20
"""Most rounds of the balanced k-means; it stops at the first that moves nobody, usually before the tenth."""


def divide(ffn: DenseFFN, shared: int, shards: int, how: Neurons, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the shared neurons (shared,) and of each shard's (G, W), together each of the F neurons once.

    Args:
        ffn: the dense network.
        shared: neurons that stay out of the shards.
        shards: G, divides F - shared.
        how: see `UpcycleSettings.neurons`.
        seed: of `kmeans` and `random`.
    """
    order_F = _order(ffn, how, seed)
    shared_S, routed_N = order_F[:shared], order_F[shared:].sort().values if how == "kmeans" else order_F[shared:]
    if how != "kmeans" or shards == 1:
        return shared_S, routed_N.view(shards, -1)
    return shared_S, routed_N[balanced_kmeans(ffn.gate_FD[routed_N], shards, seed)]


def balanced_kmeans(x_ND: Tensor, clusters: int, seed: int) -> Tensor:
    """Row indices (G, W) of `clusters` groups of equal size, close in direction.

    Plain k-means gives the first centres; then centres and the optimal balanced assignment to them alternate until
    nobody moves. N = 4096 takes seconds a layer; memory grows with N squared.
    """
    x_ND = functional.normalize(x_ND.detach().double().cpu(), dim=1)
    rng = np.random.default_rng(seed)
    centres, _ = kmeans2(x_ND.numpy(), clusters, minit="++", rng=rng, missing="warn")
    centre_GD = torch.from_numpy(centres)
    cluster_N = torch.full((len(x_ND),), -1)
    for _ in range(ROUNDS):
        before_N = cluster_N
        cluster_N = balanced_assignment(-torch.cdist(x_ND, centre_GD).square()).int().argmax(1)
        if torch.equal(cluster_N, before_N):
            break
        centre_GD = torch.stack([x_ND[cluster_N == g].mean(0) for g in range(clusters)])
    return cluster_N.argsort(stable=True).view(clusters, -1)


def importance(ffn: DenseFFN) -> Tensor:
    """How much a neuron can write for how little it reads, (F,): the product of the norms of its three weights.

    It knows nothing of the text; LLaMA-MoE v2 and CMoE measure activations or gradients instead.
    """
    return ffn.gate_FD.norm(dim=1) * ffn.up_FD.norm(dim=1) * ffn.down_DF.norm(dim=0)


def _order(ffn: DenseFFN, how: Neurons, seed: int) -> Tensor:
    if how == "kmeans":
        return importance(ffn).argsort(descending=True, stable=True)
    if how == "random":
        return torch.randperm(ffn.width, generator=torch.Generator().manual_seed(seed))
    return torch.arange(ffn.width)
