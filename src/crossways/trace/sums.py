"""`Trace`: what the routers of a model executed, summed up with bounded memory.

Legend: B batch, S sequence, T tokens (padding excluded), R routers, E experts, A routers per layer, L layers,
H = R - A pairs of neighbouring routers, N tokens kept raw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.routing import Routing
from crossways.trace.path_counts import PathCounts

Counts = NDArray[np.int64]


SUMS = ("load_RE", "budget_RK", "top_pairs_HEE", "pairs_HEE", "jaccard_H", "sizes_H", "run_L1", "entropy_R")
"""The attributes of a trace that add up."""
KEPT = ("kept_weight_NRE", "kept_mask_NRE", "kept_id_N")
"""Those that are strung together."""


@dataclass(frozen=True)
class TraceSettings:
    """How much a trace keeps."""

    path_limit: int = 100_000
    """Distinct paths counted exactly (up to twice as many); beyond, see `PathCounts`. 1,000 to 1,000,000."""
    block: int | None = None
    """Also count the paths through each block of this many consecutive layers, at least 1; None for none."""
    keep_tokens: int = 0
    """Tokens whose assignments are kept as they are, from the first on; each takes about 6 R E bytes."""


class Trace:
    """Sums over the executed assignments of many tokens; see `crossways.evaluation.paths` for what they tell.

    Neighbours are routers of the same factor in adjacent layers: in a plain model router r and r + 1, in a Cartesian
    one with A factors r and r + A. All counts are exact but those of paths, which say their error themselves.
    """

    def __init__(
        self, num_experts: int, num_routers: int, factors: int = 1, settings: TraceSettings | None = None
    ) -> None:
        """
        Args:
            num_experts: E.
            num_routers: R.
            factors: A, routers per layer; 1 but for Cartesian layers.
            settings: how much to keep.
        """
        if num_routers < 1 or num_routers % factors:
            raise UserError(f"{num_routers} routers cannot be {factors} in each layer")
        self.num_experts, self.num_routers, self.factors = num_experts, num_routers, factors
        self.settings = settings or TraceSettings()
        self.num_tokens = 0
        """Tokens seen, padding excluded."""
        neighbours, layers = num_routers - factors, num_routers // factors
        self.load_RE: Counts = np.zeros((num_routers, num_experts), np.int64)
        """Executed pairs of each expert."""
        self.budget_RK: Counts = np.zeros((num_routers, num_experts + 1), np.int64)
        """Tokens that executed 0, 1, ... E experts."""
        self.top_pairs_HEE: Counts = np.zeros((neighbours, num_experts, num_experts), np.int64)
        """Tokens whose top expert is e at a router and f at its neighbour; tokens without one are left out."""
        self.pairs_HEE: Counts = np.zeros((neighbours, num_experts, num_experts), np.int64)
        """The same for all executed experts: tokens that execute e at a router and f at its neighbour."""
        self.jaccard_H = np.zeros(neighbours)
        """Sum over tokens of |S n S'| / |S u S'| of the executed sets of neighbours; 0 if both are empty."""
        self.sizes_H: Counts = np.zeros(neighbours, np.int64)
        """Sum over tokens of |S| + |S'|, from which the pooled overlap follows."""
        self.run_L1: Counts = np.zeros(layers + 1, np.int64)
        """(token, layer, factor) positions by the length of their run of equal top experts; 0 holds tokens
        without."""
        self.entropy_R = np.zeros(num_routers)
        """Sum over tokens of the entropy of their shares of the scores, nats."""
        self.paths = PathCounts(num_routers, self.settings.path_limit)
        """Paths over all routers."""
        self.block_paths: list[PathCounts] = [
            PathCounts(stop - start, self.settings.path_limit) for start, stop in self._block_bounds()
        ]
        """Paths over each block."""
        self.kept_weight_NRE = np.zeros((0, num_routers, num_experts), np.float32)
        """Weights of the tokens kept raw, zero where not executed."""
        self.kept_mask_NRE = np.zeros((0, num_routers, num_experts), bool)
        """What the tokens kept raw executed."""
        self.kept_id_N: Counts = np.zeros(0, np.int64)
        """Their token ids, -1 if the model was given embeddings."""

    def _block_bounds(self) -> list[tuple[int, int]]:
        if self.settings.block is None:
            return []
        step = self.settings.block * self.factors
        return [(start, min(start + step, self.num_routers)) for start in range(0, self.num_routers, step)]

    @torch.no_grad()
    def record(self, routings: Sequence[Routing], token_ids_T: Tensor | None = None) -> None:
        """Add one forward pass.

        Args:
            routings: what the R routers executed, in order.
            token_ids_T: int64 (T,) with padding, to keep beside the raw tokens.
        """
        if len(routings) != self.num_routers:
            raise ValueError(f"expected the routings of {self.num_routers} routers, got {len(routings)}")
        valid_T = routings[0].valid_T
        rows = slice(None) if valid_T is None else valid_T
        mask_RTE = torch.stack([routing.assignment.to_mask()[rows] for routing in routings])
        top_TR = torch.stack([routing.assignment.top_expert_T()[rows] for routing in routings], dim=1)
        self.num_tokens += mask_RTE.shape[1]
        self.load_RE += _numpy(mask_RTE.sum(1))
        self._add_budgets(mask_RTE.sum(-1))
        self._add_neighbours(mask_RTE.float(), top_TR)
        self._add_paths(_numpy(top_TR))
        self.entropy_R += [float(share_entropy_T(routing.scores_TE[rows]).double().sum()) for routing in routings]
        self._keep(routings, mask_RTE, rows, token_ids_T)

    def _add_budgets(self, budget_RT: Tensor) -> None:
        for router, budget_T in enumerate(budget_RT):
            self.budget_RK[router] += _numpy(torch.bincount(budget_T, minlength=self.num_experts + 1))

    def _add_neighbours(self, mask_RTE: Tensor, top_TR: Tensor) -> None:
        top_RTE = nn.functional.one_hot(top_TR.t() + 1, self.num_experts + 1)[..., 1:].float()
        for pair in range(self.num_routers - self.factors):
            near_TE, far_TE = mask_RTE[pair], mask_RTE[pair + self.factors]
            both_T, sizes_T = (near_TE * far_TE).sum(-1), (near_TE + far_TE).sum(-1)
            # Products of zeros and ones in float32: exact while a batch has fewer than 2^24 tokens.
            self.pairs_HEE[pair] += _numpy((near_TE.t() @ far_TE).long())
            self.top_pairs_HEE[pair] += _numpy((top_RTE[pair].t() @ top_RTE[pair + self.factors]).long())
            self.jaccard_H[pair] += float((both_T / (sizes_T - both_T).clamp(min=1)).double().sum())
            self.sizes_H[pair] += int(sizes_T.sum(dtype=torch.float64))

    def _add_paths(self, top_TR: Counts) -> None:
        self.paths.add(top_TR)
        for counts, (start, stop) in zip(self.block_paths, self._block_bounds(), strict=True):
            counts.add(top_TR[:, start:stop])
        for factor in range(self.factors):
            self.run_L1 += run_positions(top_TR[:, factor :: self.factors])

    def _keep(self, routings: Sequence[Routing], mask_RTE: Tensor, rows: Any, token_ids_T: Tensor | None) -> None:
        room = self.settings.keep_tokens - len(self.kept_id_N)
        if room <= 0:
            return
        weight_NRE = torch.stack([routing.assignment.to_dense()[rows][:room] for routing in routings], 1)
        self.kept_weight_NRE = np.concatenate([self.kept_weight_NRE, _numpy(weight_NRE.float())])
        self.kept_mask_NRE = np.concatenate([self.kept_mask_NRE, _numpy(mask_RTE[:, :room].transpose(0, 1))])
        ids_N = np.full(len(weight_NRE), -1) if token_ids_T is None else _numpy(token_ids_T[rows][:room])
        self.kept_id_N = np.concatenate([self.kept_id_N, ids_N])

    def top_paths(self, n: int) -> Tensor:
        """The n commonest paths, int64 (n, R), for `crossways.perturb.FrequentPaths`; fewer if fewer were seen."""
        return torch.from_numpy(self.paths.most_common(n)[0])

    def merge(self, other: Trace) -> Trace:
        """Add another trace of a model of the same shape, made with the same settings; returns itself."""
        if (self.shape, self.settings) != (other.shape, other.settings):
            raise ValueError(
                f"traces of different models or settings cannot be merged: {self.shape}, {self.settings} and "
                f"{other.shape}, {other.settings}"
            )
        self.num_tokens += other.num_tokens
        for name in SUMS:
            getattr(self, name).__iadd__(getattr(other, name))
        self.paths.merge(other.paths)
        for counts, theirs in zip(self.block_paths, other.block_paths, strict=True):
            counts.merge(theirs)
        for name in KEPT:
            both = np.concatenate([getattr(self, name), getattr(other, name)])
            setattr(self, name, both[: self.settings.keep_tokens])
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, R and A."""
        return self.num_experts, self.num_routers, self.factors


def _numpy(x: Tensor) -> NDArray[Any]:
    return x.detach().cpu().numpy()


def share_entropy_T(scores_TE: Tensor) -> Tensor:
    """Entropy in nats of each token's shares of its scores, (T,); 0 for a token whose scores are all zero."""
    shares_TE = scores_TE.double() / scores_TE.double().sum(-1, keepdim=True).clamp(min=1e-30)
    return -torch.special.xlogy(shares_TE, shares_TE).sum(-1)


def run_positions(top_TL: Counts) -> Counts:
    """Of the (token, layer) positions of (T, L) top experts, how many lie in a run of 1, 2, ... L equal ones of one
    token; int64 (L + 1,) with the positions of nobody (-1) in entry 0."""
    tokens, layers = top_TL.shape
    starts_TL = np.ones((tokens, layers), bool)
    starts_TL[:, 1:] = top_TL[:, 1:] != top_TL[:, :-1]
    run_P = starts_TL.reshape(-1).cumsum() - 1
    length_P = np.bincount(run_P, minlength=1)[run_P] if tokens else run_P
    length_P = np.where(top_TL.reshape(-1) < 0, 0, length_P)
    return np.bincount(length_P, minlength=layers + 1).astype(np.int64)
