"""The knapsack over layers against brute force, greedy allocation and what must hold of any."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.tuning.allocate import allocate, predicted_loss
from crossways.tuning.sensitivity import Sensitivity


def layer(losses, budgets=None):
    return Sensitivity("layer", tuple(budgets or map(float, range(1, len(losses) + 2))), (*losses, 0.0))


losses = st.lists(
    st.lists(st.floats(-0.1, 1.0, allow_subnormal=False), min_size=3, max_size=3), min_size=2, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(losses, st.floats(1.0, 4.0))
def test_whole_budgets_are_the_best_of_all_combinations(rows, budget):
    layers = [layer(row) for row in rows]
    found = allocate(layers, budget, integral=True)
    limit = budget * len(layers) + 1e-6
    best = min(
        predicted_loss(layers, each)
        for each in itertools.product((1.0, 2.0, 3.0, 4.0), repeat=len(layers))
        if sum(each) <= limit
    )
    assert sum(found) <= limit
    assert all(each == int(each) for each in found)
    assert predicted_loss(layers, found) <= best + 1e-3


@settings(max_examples=60, deadline=None)
@given(losses, st.floats(1.0, 4.0))
def test_fractional_budgets_are_what_greedy_allocation_on_the_hulls_finds(rows, budget):
    layers = [layer(row) for row in rows]
    found = allocate(layers, budget, integral=False)
    greedy, left = 0.0, (budget - 1) * len(layers)
    gains = []
    for each in layers:
        corners = hull(each.budget_N, each.loss_N)
        greedy += corners[0][1]
        for (b0, l0), (b1, l1) in itertools.pairwise(corners):
            gains.append(((l0 - l1) / (b1 - b0), b1 - b0))
    for slope, length in sorted(gains, reverse=True):
        if slope > 0:
            taken = min(length, left)
            greedy, left = greedy - slope * taken, left - taken
    on_hulls = sum(
        np.interp(b, *zip(*hull(each.budget_N, each.loss_N), strict=True))
        for each, b in zip(layers, found, strict=True)
    )
    assert sum(found) <= budget * len(layers) + 1e-5
    assert on_hulls == pytest.approx(greedy, abs=1e-3)


def hull(xs, ys):
    """Lower convex hull, left to right."""
    kept = []
    for x, y in zip(xs, ys, strict=True):
        while len(kept) > 1 and (kept[-1][1] - kept[-2][1]) * (x - kept[-2][0]) >= (y - kept[-2][1]) * (
            kept[-1][0] - kept[-2][0]
        ):
            kept.pop()
        kept.append((x, y))
    return kept


@pytest.mark.parametrize("integral", [True, False])
def test_a_layer_that_can_be_cut_for_nothing_is_cut_first_and_all_the_way(integral):
    layers = [layer((0.5, 0.2, 0.1)), layer((0.0, 0.0, 0.0)), layer((0.5, 0.2, 0.1))]
    assert allocate(layers, 3.0, integral=integral) == (4.0, 1.0, 4.0)
    assert allocate(layers, 4.0, integral=integral) == (4.0, 1.0, 4.0)


def test_more_budget_is_never_predicted_to_lose_more():
    layers = [layer((0.9, 0.3, 0.2)), layer((0.1, 0.09, -0.05)), layer((0.4, 0.4, 0.4))]
    for integral in (True, False):
        predicted = [
            predicted_loss(layers, allocate(layers, budget, integral=integral)) for budget in np.linspace(1, 4, 13)
        ]
        assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(predicted))


def test_a_layer_whose_pairs_cost_more_gives_first():
    layers = [layer((0.3, 0.2, 0.1)), layer((0.3, 0.2, 0.1))]
    assert allocate(layers, 3.5, cost_L=[3.0, 1.0], integral=True) == (3.0, 4.0)
    assert allocate(layers, 3.5, cost_L=[1.0, 3.0], integral=True) == (4.0, 3.0)


def test_losses_of_any_size_are_told_apart():
    layers = [layer((3e-8, 2e-8, 1e-8)), layer((3e-9, 2e-9, 1e-9))]
    assert allocate(layers, 2.5, integral=True) == (4.0, 1.0)


def test_a_budget_below_the_smallest_levels_is_refused():
    with pytest.raises(UserError, match=r"0\.5 experts per token is below 1, the least .* tuning\.levels"):
        allocate([layer((0.1, 0.1, 0.1))] * 2, 0.5, integral=False)


def test_whole_budgets_between_levels_lie_on_the_straight_line():
    layers = [layer((0.4,), (2.0, 4.0)), layer((1.0,), (2.0, 4.0))]
    assert allocate(layers, 3.5, integral=True) == (3.0, 4.0)
    assert predicted_loss(layers, (3.0, 4.0)) == pytest.approx(0.2)
