"""Neurons are divided completely, in equal numbers, and by direction where that is asked."""

from __future__ import annotations

import pytest
import torch

from crossways.surgery.upcycle.ffn import DenseFFN, disturb
from crossways.surgery.upcycle.neurons import balanced_kmeans, divide, importance


def ffn(width=24, hidden=6):
    generator = torch.Generator().manual_seed(0)
    return DenseFFN(
        *(torch.randn(shape, generator=generator) for shape in ((width, hidden),) * 2 + ((hidden, width),))
    )


@pytest.mark.parametrize("how", ["kmeans", "random", "contiguous"])
@pytest.mark.parametrize(("shared", "shards"), [(0, 1), (0, 4), (8, 4), (4, 1)])
def test_every_neuron_has_one_place(how, shared, shards):
    shared_S, shard_GW = divide(ffn(), shared, shards, how, 0)
    assert shared_S.shape == (shared,)
    assert shard_GW.shape == (shards, (24 - shared) // shards)
    assert torch.cat([shared_S, shard_GW.flatten()]).sort().values.tolist() == list(range(24))


def test_kmeans_finds_directions_that_are_there():
    torch.manual_seed(0)
    centre_GD = torch.eye(4, 8)
    x_ND = (centre_GD.repeat(6, 1) + 0.1 * torch.randn(24, 8)) * torch.logspace(-2, 1, 24)[
        :, None
    ]  # length is nothing
    found = {tuple(sorted(row.tolist())) for row in balanced_kmeans(x_ND, 4, 0)}
    assert found == {tuple(range(g, 24, 4)) for g in range(4)}


def test_kmeans_is_balanced_where_the_clusters_are_not():
    torch.manual_seed(0)
    x_ND = torch.cat([torch.eye(2, 8)[:1].repeat(20, 1), torch.eye(2, 8)[1:].repeat(4, 1)])
    shard_GW = balanced_kmeans(x_ND + 0.01 * torch.randn(24, 8), 2, 0)
    assert shard_GW.shape == (2, 12)
    assert {20, 21, 22, 23} <= set(shard_GW[0].tolist()) or {20, 21, 22, 23} <= set(shard_GW[1].tolist())


def test_the_shared_expert_keeps_the_greatest_neurons():
    dense = ffn()
    shared_S, _ = divide(dense, 8, 2, "kmeans", 0)
    assert set(shared_S.tolist()) == set(importance(dense).topk(8).indices.tolist())


def test_divisions_follow_their_seed():
    same, again, other = (divide(ffn(), 0, 4, "random", seed)[1] for seed in (0, 0, 1))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_redrawing_replaces_whole_neurons_in_the_asked_share():
    dense = ffn()
    up_EHD, down_EDW = dense.experts(torch.arange(24).repeat(3, 1))
    new_up_EHD, new_down_EDW = disturb(up_EHD, down_EDW, 0.0, 0.25, torch.Generator().manual_seed(0))
    changed_EW = (new_down_EDW != down_EDW).any(1)
    assert changed_EW.sum(1).tolist() == [6, 6, 6]
    assert not torch.equal(changed_EW[0], changed_EW[1])
    for half_new, half in zip(new_up_EHD.chunk(2, 1), up_EHD.chunk(2, 1), strict=True):
        assert torch.equal((half_new != half).any(2), changed_EW)


def test_noise_is_relative_and_other_in_every_expert():
    up_EHD, down_EDW = ffn(240, 60).experts(torch.arange(240).repeat(2, 1))
    new_EHD, _ = disturb(100 * up_EHD, down_EDW, 0.1, 0.0, torch.Generator().manual_seed(0))
    noise_EHD = new_EHD - 100 * up_EHD
    assert float(noise_EHD.std()) == pytest.approx(10.0, rel=0.05)
    assert not torch.allclose(noise_EHD[0], noise_EHD[1])
