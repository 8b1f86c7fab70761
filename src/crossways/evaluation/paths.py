"""What a trace tells: the metrics of expert paths, each with its definition.

PathMoE (arXiv 2603.18297) names most of them; of their formulas only that of a path (a token's top-1 expert at each
layer) is published, so these definitions are ours and absolute values do not compare with the paper's.

Legend: R routers, E experts, H pairs of neighbouring routers (of one factor in adjacent layers), N paths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from crossways.trace import PathCounts, Trace

Floats = NDArray[np.float64]
ENGAGED = 4
"""Layers in a row that count as sustained engagement."""


@dataclass(frozen=True)
class PathCoverage:
    """C(n): share of tokens on the n commonest paths."""

    n: int
    """Paths."""
    lower: float
    """Share that is certain, 0 to 1; exact if it equals `upper`."""
    upper: float
    """Greatest share possible, given the error of counts with bounded memory."""


@dataclass(frozen=True)
class PathMetrics:
    """All metrics of one trace; of neighbouring routers None where there are none."""

    tokens: int
    """Tokens traced, padding excluded."""
    budget: float
    """Mean experts per token and router."""
    unrouted: float
    """Share of (token, router) positions without any expert."""
    distinct_paths: int
    """Distinct paths; with bounded memory those still held."""
    paths_exact: bool
    """Whether that and the coverage are exact."""
    distinct_per_token: float
    """Distinct paths per token, 1 if no path repeats. Falls with the number of tokens: compare at equal numbers
    only."""
    distinct_block_paths: float | None
    """Mean over blocks of distinct paths through one block; None unless blocks were traced. Full-depth paths are
    nearly unique on small samples, those of a block are not."""
    coverage: tuple[PathCoverage, ...]
    """Share of tokens on the n commonest paths, for some n."""
    routing_entropy: float
    """Mean over tokens and routers of -sum_e p_e log p_e / log E, where p is the token's share of scores: 0 is
    certain, 1 is even. Sharpness of single decisions, not balance."""
    load_entropy: float
    """Mean over routers of the entropy of the executed load over log E: 1 is perfect balance. Not certainty."""
    jaccard: float | None
    """Mean over tokens and neighbours of |S n S'| / |S u S'| by expert index. Independent routers have no common
    order of experts, so beside it stands its `jaccard_chance`, without which it cannot be read."""
    jaccard_chance: float | None
    """What two independent choices would give: see `chance_jaccard`; 0.158 for 4 of 16."""
    jaccard_pooled: float | None
    """Sum of intersections over sum of unions, by expert index."""
    jaccard_matched: float | None
    """The same after the best one-to-one relabelling (Hungarian method) of each router's experts. The relabelling is
    fitted to this very trace, so it exceeds chance on few tokens even for independent routers."""
    top_agreement: float | None
    """Share of tokens with the same top-1 index at neighbours, among tokens that have one at both."""
    top_agreement_matched: float | None
    """The same after the best relabelling."""
    engaged: float | None
    """Sustained engagement: share of (token, layer) positions in a run of 4 or more layers with one top-1 index; None
    for fewer than 4 layers."""


def path_metrics(trace: Trace, coverage_at: tuple[int, ...] = (1, 10, 100, 1000)) -> PathMetrics:
    """Compute everything; raises `ValueError` for an empty trace."""
    if not trace.num_tokens:
        raise ValueError("the trace is empty")
    linked = trace.num_routers > trace.factors
    positions = trace.num_tokens * trace.num_routers
    blocks = [len(counts) for counts in trace.block_paths]
    engaged_possible = len(trace.run_L1) - 1 >= ENGAGED
    return PathMetrics(
        tokens=trace.num_tokens,
        budget=float(trace.load_RE.sum() / positions),
        unrouted=float(trace.budget_RK[:, 0].sum() / positions),
        distinct_paths=len(trace.paths),
        paths_exact=trace.paths.error == 0,
        distinct_per_token=len(trace.paths) / trace.num_tokens,
        distinct_block_paths=sum(blocks) / len(blocks) if blocks else None,
        coverage=tuple(path_coverage(trace.paths, n) for n in coverage_at),
        routing_entropy=float(_in_log_e(trace.entropy_R / trace.num_tokens, trace.num_experts).mean()),
        load_entropy=float(_in_log_e(load_entropy_R(trace), trace.num_experts).mean()),
        jaccard=float(trace.jaccard_H.mean() / trace.num_tokens) if linked else None,
        jaccard_chance=chance_jaccard(trace) if linked else None,
        jaccard_pooled=pooled_jaccard(trace, matched=False) if linked else None,
        jaccard_matched=pooled_jaccard(trace, matched=True) if linked else None,
        top_agreement=agreement(trace.top_pairs_HEE) if linked else None,
        top_agreement_matched=agreement(trace.top_pairs_HEE, matched=True) if linked else None,
        engaged=float(trace.run_L1[ENGAGED:].sum() / trace.run_L1.sum()) if engaged_possible else None,
    )


def path_coverage(paths: PathCounts, n: int) -> PathCoverage:
    """C(n), with the bounds that the error of the counts leaves."""
    seen = int(paths.most_common(n)[1].sum())
    return PathCoverage(n, seen / paths.total, min(1.0, (seen + n * paths.error) / paths.total))


def _in_log_e(entropy: Floats, num_experts: int) -> Floats:
    return entropy / math.log(num_experts) if num_experts > 1 else entropy * 0


def load_entropy_R(trace: Trace) -> Floats:
    """Entropy in nats of each router's executed load, (R,); 0 for a router that executed nothing."""
    share_RE = trace.load_RE / np.maximum(trace.load_RE.sum(1, keepdims=True), 1)
    return -np.where(share_RE > 0, share_RE * np.log(np.where(share_RE > 0, share_RE, 1)), 0).sum(1)


def match_experts(pairs_EE: NDArray[np.int64]) -> NDArray[np.int64]:
    """The one-to-one relabelling int64 (E,) of a router's neighbour that agrees with it most often: its expert
    `result[e]` is matched with e (Hungarian method)."""
    return linear_sum_assignment(pairs_EE, maximize=True)[1]


def agreement(pairs_HEE: NDArray[np.int64], matched: bool = False) -> float:
    """Share of the counted pairs on the diagonal, or on the best relabelling of it; 0 where nothing was counted."""
    return _on_diagonal(pairs_HEE, matched) / max(int(pairs_HEE.sum()), 1)


def pooled_jaccard(trace: Trace, matched: bool) -> float:
    """Sum over tokens and neighbours of |S n S'| over the sum of |S u S'|."""
    both = _on_diagonal(trace.pairs_HEE, matched)
    return both / max(int(trace.sizes_H.sum()) - both, 1)


def _on_diagonal(pairs_HEE: NDArray[np.int64], matched: bool) -> int:
    labels_E = np.arange(pairs_HEE.shape[1])
    return sum(
        int(pairs_EE[labels_E, match_experts(pairs_EE) if matched else labels_E].sum()) for pairs_EE in pairs_HEE
    )


def chance_jaccard(trace: Trace) -> float:
    """Mean Jaccard index of uniformly random sets whose sizes are independent and as often as those executed: the
    level of routers that have nothing to do with each other and whose loads are even.

    For two sets of a and b out of E the intersection is hypergeometric. With uneven loads two unrelated routers that
    happen to favour the same indices lie above it.
    """
    experts = trace.num_experts
    expected_KK = np.array(
        [[expected_jaccard(a, b, experts) for b in range(experts + 1)] for a in range(experts + 1)]
    )
    share_RK = trace.budget_RK / trace.num_tokens
    levels = [
        share_RK[router] @ expected_KK @ share_RK[router + trace.factors]
        for router in range(trace.num_routers - trace.factors)
    ]
    return float(np.mean(levels))


def expected_jaccard(a: int, b: int, experts: int) -> float:
    """E[|S n S'| / |S u S'|] for independent uniform sets of a and b out of `experts`; 0 if both are empty."""
    if a + b == 0:
        return 0.0
    ways = math.comb(experts, b)
    overlaps = range(max(0, a + b - experts), min(a, b) + 1)
    return sum(math.comb(a, i) * math.comb(experts - a, b - i) / ways * i / (a + b - i) for i in overlaps)
