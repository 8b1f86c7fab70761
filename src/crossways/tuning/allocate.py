"""Spend a global budget where it is missed most: a knapsack over the layers' measured sensitivities.

Legend: L layers, N levels of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from crossways.errors import UserError
from crossways.tuning.sensitivity import Sensitivity


def allocate(
    sensitivities: Sequence[Sensitivity], budget: float, cost_L: Sequence[float] | None = None, *, integral: bool
) -> tuple[float, ...]:
    """Experts per token for each layer, of least predicted loss within a mean budget.

    Layer l is to take level n by x_ln, sum_n x_ln = 1; minimise sum x_ln loss_ln subject to sum x_ln cost_l budget_ln
    <= budget * sum_l cost_l. With whole budgets, x is 0 or 1 over every whole number from the smallest level up,
    losses in between taken on the straight line: the multiple-choice knapsack, solved exactly by branch and bound.
    With fractional ones x lies in [0, 1]: the linear program, whose optimum lies on the lower convex hull of each
    layer's curve and equals what greedy allocation by falling marginal gain along the hulls finds (at most one layer
    ends between two corners).

    Losses are taken to add up over layers. They do not quite, which is why each allocation is then measured.

    Args:
        sensitivities: one for each layer.
        budget: mean experts per token, weighted by cost.
        cost_L: what a pair costs in each layer, in any unit; default equal.
        integral: whether budgets must be whole.

    Raises:
        UserError: a budget below the least that the levels allow.
    """
    curves = [_whole(each) if integral else (each.budget_N, each.loss_N) for each in sensitivities]
    scale_L = np.ones(len(curves)) if cost_L is None else np.asarray(cost_L, dtype=float) / np.mean(cost_L)
    spent = np.concatenate([c * np.asarray(b) for c, (b, _) in zip(scale_L, curves, strict=True)])
    loss = np.concatenate([np.asarray(values) for _, values in curves])
    layer = np.repeat(np.arange(len(curves)), [len(values) for _, values in curves])
    one_level = (layer == np.arange(len(curves))[:, None]).astype(float)
    limit = budget * len(curves)
    least = sum(spent[layer == index].min() for index in range(len(curves)))
    if least > limit * (1 + 1e-9):
        raise UserError(
            f"a mean budget of {budget:g} experts per token is below {least / len(curves):g}, the least that the "
            "measured levels allow; add smaller ones to tuning.levels"
        )
    # Scaled, as the solver's tolerances are absolute; and of equal losses the cheaper, by a nudge of a ten-thousandth
    # of the greatest loss for the whole budget.
    scaled = loss / (np.abs(loss).max() or 1.0) + 1e-4 * spent / limit
    solved = milp(
        scaled,
        constraints=[LinearConstraint(one_level, 1, 1), LinearConstraint(spent[None], -np.inf, limit * (1 + 1e-9))],
        bounds=Bounds(0, 1),
        integrality=np.full(len(loss), int(integral)),
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        raise RuntimeError(f"the allocation of {budget:g} experts per token failed: {solved.message}")
    taken = np.concatenate([np.asarray(b, dtype=float) for b, _ in curves]) * solved.x
    budgets = [math.fsum(taken[layer == index]) for index in range(len(curves))]
    return tuple(float(round(each)) if integral else round(each, 6) for each in budgets)


def predicted_loss(sensitivities: Sequence[Sensitivity], budget_L: Sequence[float]) -> float:
    """Nats per token more than at the model's own budgets, if losses added up; straight lines between levels."""
    parts = (
        float(np.interp(budget, each.budget_N, each.loss_N))
        for each, budget in zip(sensitivities, budget_L, strict=True)
    )
    return math.fsum(parts)


def _whole(sensitivity: Sensitivity) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The curve at every whole budget between its ends."""
    budget_N = tuple(float(k) for k in range(round(sensitivity.budget_N[0]), round(sensitivity.budget_N[-1]) + 1))
    return budget_N, tuple(np.interp(budget_N, sensitivity.budget_N, sensitivity.loss_N).tolist())
