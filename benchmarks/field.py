"""Who may be timed: contenders that equal `naive` on the very inputs, and in the very passes, of a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from contenders import DENSE, AbsentError, make
from measure import clock_of
from problems import TOLERANCE, Contender, Problem, badness


@dataclass
class Field:
    """Who may be timed, and what was learnt when that was found out."""

    taking_part: dict[str, Contender]
    """`dense` first, then those that equal `naive`."""
    errors: dict[str, float]
    """Of those, the greatest error of all passes."""
    left_out: dict[str, str]
    """The others, and why."""
    first: dict[bool, dict[str, float]]
    """Seconds of the pass that was checked, without and with backward, of all that can: everybody's warm-up."""


def right(problem: Problem, names: Sequence[str], passes: Sequence[bool] = (False, True)) -> Field:
    """Make the contenders and hold each of the passes to be timed to `naive`, on the inputs that it will be timed on.

    Args:
        problem: the inputs.
        names: of the contenders beside the dense network, which has nothing to be held to and warms up alone.
        passes: without gradients, which may be another path through a backend, or with them, or both.
    """
    field = Field({}, {}, {}, {backward: {} for backward in passes})
    problem.expected(any(passes))
    for name in (DENSE, *names):
        try:
            contender = make(problem, name)
            possible = [backward for backward in passes if not (backward and contender.forward_only)]
            errors = [_pass(problem, name, contender, backward, field) for backward in possible]
            error, where = max(errors, key=badness)
        except AbsentError as absent:
            field.left_out[name] = str(absent)
        except Exception as failure:  # of a peer or of ours: the table says so and goes on
            reason = (str(failure) or "?").splitlines()[0]
            field.left_out[name] = f"FAILED with {type(failure).__name__}: {reason}"
        else:
            if error <= TOLERANCE[problem.dtype]:
                field.taking_part[name] = contender
                field.errors[name] = error
                if contender.forward_only and True in passes:
                    field.left_out[f"{name} with backward"] = contender.forward_only
            else:
                field.left_out[name] = f"WRONG: {where} differs from naive by {error:.1e}"
    problem.reference.clear()
    return field


def _pass(problem: Problem, name: str, contender: Contender, backward: bool, field: Field) -> tuple[float, str]:
    results: list[Tensor] = []
    clock = clock_of(problem.device)
    field.first[backward][name] = clock(lambda: results.extend(problem.results(contender, backward)))
    return (0.0, "") if name == DENSE else problem.error(contender, results)
