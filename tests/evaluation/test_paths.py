"""Path metrics: each definition by hand, and its extremes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from crossways.assignment import Assignment
from crossways.evaluation.paths import (
    agreement,
    chance_jaccard,
    expected_jaccard,
    match_experts,
    path_coverage,
    path_metrics,
)
from crossways.routing import Routing
from crossways.trace import PathCounts, Trace, TraceSettings


def trace_of_sets(*routers, experts=4, scores=None, **settings):
    """A trace of tokens that execute the given sets with equal weights; one list of sets per router."""
    routings = []
    for sets in routers:
        mask_TE = torch.tensor([[expert in chosen for expert in range(experts)] for chosen in sets])
        scores_TE = mask_TE.float() if scores is None else torch.tensor(scores)
        routings.append(Routing(scores_TE, scores_TE, Assignment.from_mask(mask_TE, mask_TE.float())))
    trace = Trace(experts, len(routers), settings=TraceSettings(**settings))
    trace.record(routings)
    return trace


def test_four_of_sixteen_overlap_by_chance_as_the_literature_says():
    assert expected_jaccard(4, 4, 16) == pytest.approx(0.158, abs=5e-4)


@pytest.mark.parametrize(("a", "b", "experts"), [(1, 1, 4), (2, 3, 5), (0, 2, 3), (3, 3, 3), (4, 2, 5)])
def test_expected_overlap_against_enumeration(a, b, experts):
    pairs = itertools.product(itertools.combinations(range(experts), a), itertools.combinations(range(experts), b))
    ratios = [len({*s} & {*t}) / len({*s} | {*t}) for s, t in pairs]
    assert expected_jaccard(a, b, experts) == pytest.approx(sum(ratios) / len(ratios))


def test_chance_weighs_the_sizes_that_were_executed():
    trace = trace_of_sets([{0}, {0, 1}], [{2}, {3}])
    expected = (expected_jaccard(1, 1, 4) + expected_jaccard(2, 1, 4)) / 2
    assert chance_jaccard(trace) == pytest.approx(expected)


def test_independent_routers_measure_their_chance_level():
    generator = np.random.default_rng(0)
    sets = [[set(generator.choice(16, 4, replace=False).tolist()) for _ in range(4000)] for _ in range(2)]
    metrics = path_metrics(trace_of_sets(*sets, experts=16))
    assert metrics.jaccard == pytest.approx(metrics.jaccard_chance, abs=0.005)
    assert metrics.jaccard_matched > metrics.jaccard_pooled


def test_relabelled_routers_agree_after_matching_only():
    first = [{0}, {1}, {2}, {3}, {0}]
    second = [{(expert + 1) % 4 for expert in chosen} for chosen in first]
    metrics = path_metrics(trace_of_sets(first, second))
    assert (metrics.jaccard, metrics.jaccard_pooled, metrics.top_agreement) == (0.0, 0.0, 0.0)
    assert (metrics.jaccard_matched, metrics.top_agreement_matched) == (1.0, 1.0)


def test_matching_by_hand():
    pairs_EE = np.array([[5, 9, 0], [8, 9, 0], [0, 0, 1]])  # 9 + 8 + 1 beats the diagonal's 5 + 9 + 1
    assert match_experts(pairs_EE).tolist() == [1, 0, 2]
    assert agreement(pairs_EE[None]) == pytest.approx(15 / 32)
    assert agreement(pairs_EE[None], matched=True) == pytest.approx(18 / 32)


def test_overlaps_by_hand():
    metrics = path_metrics(trace_of_sets([{0, 1}, {2}], [{1, 2}, {2, 3}]))
    assert metrics.jaccard == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert metrics.jaccard_pooled == pytest.approx(2 / 5)
    assert metrics.budget == pytest.approx(7 / 4)


def test_engagement_by_hand():
    one, two = [0, 0, 0, 0, 1], [2, 2, 2, 1, 1]  # four of five positions; none
    trace = trace_of_sets(*[[{a}, {b}] for a, b in zip(one, two, strict=True)])
    assert path_metrics(trace).engaged == pytest.approx(4 / 10)
    assert path_metrics(trace_of_sets([{0}], [{0}], [{0}])).engaged is None


def test_entropies_by_hand():
    uniform = path_metrics(trace_of_sets([{0}, {0}], scores=[[0.25] * 4] * 2))
    assert uniform.routing_entropy == pytest.approx(1.0)
    assert uniform.load_entropy == pytest.approx(0.0)
    sharp = path_metrics(trace_of_sets([{0}, {1}], scores=[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]))
    assert sharp.routing_entropy == pytest.approx(0.0)
    assert sharp.load_entropy == pytest.approx(math.log(2) / math.log(4))


def test_coverage_exact_and_bounded():
    counts = PathCounts(1)
    counts.add(np.array([[0]] * 5 + [[1]] * 3 + [[2]] * 2))
    assert [(path_coverage(counts, n).lower, path_coverage(counts, n).upper) for n in (1, 2, 9)] == [
        (0.5, 0.5),
        (0.8, 0.8),
        (1.0, 1.0),
    ]
    short = PathCounts(1, limit=1)
    short.add(np.array([[0]] * 5 + [[1]] * 3 + [[2]] * 2))  # 3 is taken off: one path of 2, error 3
    assert (path_coverage(short, 1).lower, path_coverage(short, 1).upper) == (0.2, 0.5)
    assert (path_coverage(short, 2).lower, path_coverage(short, 2).upper) == (0.2, 0.8)


def test_distinct_paths_on_the_whole_and_on_blocks():
    trace = trace_of_sets([{0}, {0}, {1}], [{0}, {0}, {0}], [{2}, {3}, {2}], block=2)
    metrics = path_metrics(trace)
    assert (metrics.distinct_paths, metrics.distinct_per_token, metrics.paths_exact) == (3, 1.0, True)
    assert metrics.distinct_block_paths == pytest.approx((2 + 2) / 2)


def test_tokens_without_an_expert():
    metrics = path_metrics(trace_of_sets([set(), {0}], [{1}, set()]))
    assert metrics.unrouted == pytest.approx(0.5)
    assert metrics.top_agreement == 0.0


def test_one_router_has_no_neighbours_and_no_tokens_no_metrics():
    metrics = path_metrics(trace_of_sets([{0}]))
    assert metrics.jaccard is metrics.jaccard_matched is metrics.top_agreement is None
    with pytest.raises(ValueError, match="empty"):
        path_metrics(Trace(4, 2))
