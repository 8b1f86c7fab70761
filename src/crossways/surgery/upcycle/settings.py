"""How a feed-forward network becomes experts: one dial, the granularity, from copies to a split."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from crossways.settings import Settings

Neurons = Literal["kmeans", "random", "contiguous"]
Carrier = Literal["experts", "shared"]
GateStart = Literal["auto", "random", "groups", "centres"]


class UpcycleSettings(Settings):
    """What an upcycling does beside the routing that the model's configuration says.

    The feed-forward network's F neurons are divided into G = `granularity` shards, and E experts hold E / G copies of
    each: G = 1 is sparse upcycling, G = E the plain split, between them lie fine-grained experts.
    """

    granularity: int = Field(default=1, ge=1)
    """Shards G that the feed-forward network is divided into, each an expert's width F / G; divides the number of
    experts. 1 copies it whole, the number of experts splits it; 2 to 16 are fine-grained copies."""
    neurons: Neurons = "kmeans"
    """Which neurons make a shard: `kmeans` (those whose input weights point the same way, in equal numbers), or
    as controls `random` and `contiguous`. The same choice picks the neurons of a shared expert (`kmeans`: those
    with the greatest weights)."""
    carrier: Carrier = "experts"
    """What carries the dense function: the routed `experts`, or a `shared` expert of the full width F beside routed
    experts that start silent, which is the same function under any routing and costs the dense operations on top."""
    gate_start: GateStart = "auto"
    """How linear gates start: `random`; `groups` (all shards of one copy share their row, so that top-k chooses whole
    copies); `centres` (each shard's mean input weights, when every shard has one expert); `auto` picks the one that
    fits."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise added to every expert, relative to that of the matrix it is added to; 0 for none,
    else 0.01 to 0.1. Experts that are copies part without it too, because they are trained on different tokens."""
    redraw: float = Field(default=0.0, ge=0, le=1)
    """Share of every expert's neurons that are drawn anew with the mean and deviation of its matrices
    (Drop-Upcycling); 0 for none, 0.5 in the paper."""
    seed: int = Field(default=0, ge=0)
    """Of gates, clustering, noise and redrawn neurons."""
