"""Bring a model to the size of another by solving for its widths: equal total and equal active parameters.

Both quantities are affine in every width, whatever the rest of the model is, so a few exact counts give the equations
and linear algebra their real solution; a small search around it finds whole numbers. Which comparison is fair is the
recipe's business; that what is called equal is equal within the tolerance is this file's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from crossways.errors import UserError
from crossways.evaluation.cost import ParameterCounts
from crossways.study.recipe import Knob, MatchSettings, Quantity

Count = Callable[[Mapping[Knob, int]], ParameterCounts]
"""Parameter counts of the model with the given widths."""

LEAST: dict[Knob, int] = {"intermediate_size": 1, "moe_intermediate_size": 1, "shared_expert_intermediate_size": 0}


@dataclass(frozen=True)
class Target:
    """The size to reach."""

    name: str
    """The reference, for messages."""
    counts: ParameterCounts
    """Its size."""
    quantities: tuple[Quantity, ...]
    """Which of its counts are to be met."""


def solve_widths(
    name: str, count: Count, widths: Mapping[Knob, int], target: Target, settings: MatchSettings
) -> dict[Knob, int]:
    """The whole-number widths whose counts are nearest to the target; the declared ones if they are near enough.

    A variant that only shares gates thus keeps its experts as they are, instead of growing them by a few columns.

    Args:
        name: the variant, for messages.
        count: exact parameter counts as a function of the widths.
        widths: the knobs and their declared values; with more knobs than quantities the change is the smallest one.
        target: what to reach.
        settings: tolerance and granularity.

    Raises:
        UserError: when no widths come within the tolerance; states both sizes and what to change.
    """
    model = _Affine.probe(count, widths, target.quantities)
    wanted = np.array([getattr(target.counts, quantity) for quantity in target.quantities], dtype=float)
    best: dict[Knob, int] = dict(widths)
    if model.error(best, wanted) <= settings.tolerance:
        return best
    for step in _granularities(settings.multiple_of):
        candidates = _candidates(model.solve(wanted), list(widths), step)
        best = min(candidates, key=lambda found: model.error(found, wanted))
        if model.error(best, wanted) <= settings.tolerance:
            return best
    raise UserError(_refusal(name, best, count(best), target, settings.tolerance))


@dataclass(frozen=True)
class _Affine:
    """counts = offset + slope @ widths."""

    offset_Q: np.ndarray
    slope_QN: np.ndarray
    start_N: np.ndarray
    least_N: np.ndarray

    @classmethod
    def probe(cls, count: Count, widths: Mapping[Knob, int], quantities: Sequence[Quantity]) -> _Affine:
        # Active counts round a fractional budget to whole parameters; a wide probe makes the slope insensitive to it.
        base: dict[Knob, int] = dict.fromkeys(widths, 1)
        far = 1024

        def at(point: Mapping[Knob, int]) -> np.ndarray:
            counts = count(point)
            return np.array([getattr(counts, quantity) for quantity in quantities], dtype=float)

        origin_Q = at(base)
        slope_QN = np.stack([(at({**base, knob: 1 + far}) - origin_Q) / far for knob in widths], axis=1)
        return cls(
            offset_Q=origin_Q - slope_QN.sum(1),
            slope_QN=slope_QN,
            start_N=np.array(list(widths.values()), dtype=float),
            least_N=np.array([LEAST[knob] for knob in widths], dtype=float),
        )

    def solve(self, wanted_Q: np.ndarray) -> Iterator[np.ndarray]:
        """The real solution nearest to the declared widths, and those with some widths held at their least."""
        for held in itertools.product((False, True), repeat=len(self.start_N)):
            held_N = np.array(held)
            start_N = np.where(held_N, self.least_N, self.start_N)
            scale_Q = 1.0 / wanted_Q  # relative errors count, not absolute ones
            slope_QN = self.slope_QN * scale_Q[:, None] * ~held_N
            gap_Q = (wanted_Q - self.offset_Q - self.slope_QN @ start_N) * scale_Q
            yield np.maximum(start_N + np.linalg.lstsq(slope_QN, gap_Q, rcond=None)[0], self.least_N)

    def error(self, widths: Mapping[Knob, int], wanted_Q: np.ndarray) -> float:
        """Greatest relative difference."""
        reached_Q = self.offset_Q + self.slope_QN @ np.array(list(widths.values()), dtype=float)
        return float(np.abs(reached_Q / wanted_Q - 1).max())


def _granularities(multiple_of: int) -> Iterator[int]:
    while multiple_of > 1:
        yield multiple_of
        multiple_of //= 2
    yield 1


def _candidates(solutions: Iterator[np.ndarray], knobs: Sequence[Knob], step: int) -> list[dict[Knob, int]]:
    """Multiples of `step` within two steps of each real solution."""
    found = []
    for solution_N in solutions:
        ranges = []
        for knob, width in zip(knobs, solution_N, strict=True):
            nearby = [step * (int(width // step) + shift) for shift in range(-1, 3)]
            ranges.append([width for width in nearby if width >= LEAST[knob]])
        found += [dict(zip(knobs, widths, strict=True)) for widths in itertools.product(*ranges)]
    return found


def _refusal(
    name: str, widths: Mapping[Knob, int], reached: ParameterCounts, target: Target, tolerance: float
) -> str:
    def side(quantity: Quantity) -> str:
        got, want = getattr(reached, quantity), getattr(target.counts, quantity)
        return f"{quantity} {got / 1e6:.2f}M instead of {want / 1e6:.2f}M ({got / want - 1:+.1%})"

    sides = " and ".join(side(quantity) for quantity in target.quantities)
    solved = ", ".join(f"{knob} = {width}" for knob, width in widths.items())
    return (
        f"variant {name!r} cannot be brought within {tolerance:.1%} of {target.name!r}: the best is {solved}, "
        f"giving {sides}; {_advice(widths, reached, target)}, "
        "raise match.tolerance, or match fewer quantities (match.quantities of the variant)"
    )


def _advice(widths: Mapping[Knob, int], reached: ParameterCounts, target: Target) -> str:
    if "moe_intermediate_size" not in widths:
        return "change the other widths or the number of layers"
    if "total" not in target.quantities or "active" not in target.quantities:
        return "change num_experts or k"
    share, wanted = reached.active / reached.total, target.counts.active / target.counts.total
    return f"{'raise num_experts or lower k' if share > wanted else 'lower num_experts or raise k'} (k / num_experts)"
