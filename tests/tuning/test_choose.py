"""Who may be chosen, who is, and what other text says to it."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossways.surgery.rule import Rule
from crossways.tuning.choose import choose, efficient, qualifies, verdict_of, why_none
from crossways.tuning.compare import Difference
from crossways.tuning.frontier import Point, Setting
from crossways.tuning.score import Scored
from crossways.tuning.settings import LossLimit

LIMIT = LossLimit("1%", math.log(1.01))


def point(flops, nats=0.0, upper=None, family="token-choice"):
    scored = Scored((1.0,), (1,), (int(flops),), 1)
    difference = Difference(nats, nats, nats if upper is None else upper, 30)
    return Point(Setting(family, "uniform", Rule(), (1.0,)), None, scored, difference, float(flops))


ORIGINAL = point(100, family="own")


def test_the_cheapest_of_those_within_the_limit_by_their_bound_is_chosen():
    sure, cheap_but_unsure, beyond = point(60, 0.004, 0.009), point(50, 0.004, 0.011), point(20, 0.5, 0.6)
    assert choose([point(80), beyond, cheap_but_unsure, sure], ORIGINAL, LIMIT) is sure


def test_of_equal_cost_the_better_is_chosen():
    worse, better = point(60, 0.005), point(60, -0.002)
    assert choose([worse, better], ORIGINAL, LIMIT) is better


def test_a_leaky_setting_is_never_chosen():
    leaky = point(10, -1.0, -0.9, family="usmoe")
    assert not qualifies(leaky, ORIGINAL, LIMIT)
    assert choose([leaky], ORIGINAL, LIMIT) is None
    assert leaky not in efficient([leaky, point(60)], ORIGINAL)


def test_what_saves_nothing_is_never_chosen():
    assert choose([point(100, -0.5), point(110, -0.5)], ORIGINAL, LIMIT) is None
    assert "executes fewer expert FLOPs" in why_none([point(100)], ORIGINAL, LIMIT)


def test_the_reason_names_the_nearest_miss():
    reason = why_none([point(50, 0.3, 0.4), point(80, 0.02, 0.03)], ORIGINAL, LIMIT)
    assert "within 1% (0.0100 nats per token)" in reason
    assert "loses 0.0200, with an upper bound of 0.0300" in reason


@pytest.mark.parametrize(
    ("nats", "upper", "verdict"),
    [(0.002, 0.008, "confirmed"), (0.002, 0.02, "not shown"), (0.02, 0.03, "contradicted")],
)
def test_verdicts(nats, upper, verdict):
    assert verdict_of(Difference(nats, nats, upper, 30), LIMIT) == verdict


@given(st.lists(st.tuples(st.integers(1, 120), st.floats(-1, 1)), max_size=12))
def test_along_the_frontier_more_cost_always_buys_quality(pairs):
    points = [point(flops, nats) for flops, nats in pairs]
    line = efficient(points, ORIGINAL)
    costs, losses = [p.flops for p in line], [p.difference.nats for p in line]
    assert costs == sorted(set(costs))
    assert losses == sorted(set(losses), reverse=True)
    for each in [*points, ORIGINAL]:
        assert any(p.flops <= each.flops and p.difference.nats <= each.difference.nats for p in line)
