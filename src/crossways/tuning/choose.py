"""Which setting is cheapest within the limit, and whether other text agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from crossways.tuning.compare import Difference
from crossways.tuning.frontier import Point
from crossways.tuning.settings import LossLimit

Verdict = Literal["confirmed", "not shown", "contradicted"]


def qualifies(point: Point, original: Point, limit: LossLimit) -> bool:
    """Whether a setting may be chosen: not leaky, cheaper than the original, and its loss below the limit by more
    than the uncertainty, that is by its one-sided upper bound."""
    return not point.setting.leaky and point.flops < original.flops and point.difference.upper <= limit.nats


def choose(points: Sequence[Point], original: Point, limit: LossLimit) -> Point | None:
    """The qualified setting of fewest executed expert FLOPs, of equal ones that of least loss; None if none is.

    The best of many looks better than it is, on the text it was picked on: hence the confirmation on another.
    """
    qualified = [point for point in points if qualifies(point, original, limit)]
    return min(qualified, key=lambda point: (point.flops, point.difference.nats), default=None)


def verdict_of(difference: Difference, limit: LossLimit) -> Verdict:
    """What text that played no part in the choice says: `confirmed` if even the upper bound is within the limit,
    `contradicted` if the mean is beyond it, `not shown` in between."""
    if difference.upper <= limit.nats:
        return "confirmed"
    return "contradicted" if difference.nats > limit.nats else "not shown"


def why_none(points: Sequence[Point], original: Point, limit: LossLimit) -> str:
    """Why nothing qualified, with the nearest miss."""
    cheaper = [p for p in points if not p.setting.leaky and p.flops < original.flops]
    if not cheaper:
        return "no setting that could be chosen executes fewer expert FLOPs than the model as it is"
    best = min(cheaper, key=lambda point: point.difference.upper)
    return (
        f"no setting keeps the loss within {limit.text} ({limit.nats:.4f} nats per token); the nearest, "
        f"{best.setting.label} at {best.scored.budget:.3f} experts per token, loses {best.difference.nats:.4f}, with "
        f"an upper bound of {best.difference.upper:.4f}. Allow a greater loss, try larger tuning.budgets, or narrow "
        "the bound with more tuning.tuning_tokens"
    )


def efficient(points: Sequence[Point], original: Point) -> list[Point]:
    """The frontier: points that no other one beats in both cost and loss, leaky ones left out, cheapest first."""
    honest = sorted(
        [original, *(p for p in points if not p.setting.leaky)], key=lambda p: (p.flops, p.difference.nats)
    )
    found: list[Point] = []
    for point in honest:
        if not found or point.difference.nats < found[-1].difference.nats:
            found.append(point)
    return found
