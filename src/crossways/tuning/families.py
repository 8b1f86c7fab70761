"""The ways to route that are compared, each a rule that lacks only its budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, get_args

from crossways.errors import UserError
from crossways.rules.score.among_top import Of
from crossways.rules.select import Selection
from crossways.surgery.handle import Handle
from crossways.surgery.reading import Reading
from crossways.surgery.rule import Rule, presets

OWN = "own"
"""The model as it is, the baseline of everything."""


@dataclass(frozen=True)
class Family:
    """One way to route, at any budget."""

    name: str
    label: str
    """For readers."""
    integral: bool = False
    """Whether a layer's budget must be a whole number."""
    calibrated: bool = False
    """Whether cutoffs must be set on text for each budget."""
    leaky: bool = False
    """Whether it looks at later tokens: drawn, never chosen."""
    sensitivities_of: str = ""
    """The family whose sensitivities it shares; empty for its own."""
    kept: bool = False
    """Whether chosen experts keep the weights they have among the model's own k, where the model itself scales the
    weights of a token to sum to one; where it does not, they are kept anyway."""

    def applies(self, own: OwnRouting) -> bool:
        """Whether it is a family of its own for this model."""
        return not self.kept or own.kept_score is not None


FAMILIES = {
    family.name: family
    for family in (
        Family("token-choice", "token choice, the model's own rule", integral=True),
        Family("token-choice-kept", "token choice, weights kept", integral=True, kept=True),
        Family("usmoe", "USMoE, global budget", leaky=True, sensitivities_of="usmoe-threshold"),
        Family("usmoe-threshold", "USMoE's causal twin", calibrated=True),
        Family("threshold", "threshold on the model's own score", calibrated=True),
        Family("threshold-kept", "threshold, weights kept", calibrated=True, kept=True),
    )
}


@dataclass(frozen=True)
class OwnRouting:
    """How the model routes by itself: the yardstick of budgets and costs."""

    layers: tuple[str, ...]
    """Paths of the routed blocks."""
    k_L: tuple[int, ...]
    """Experts per token of each."""
    num_experts_L: tuple[int, ...]
    select: dict[str, Any]
    """The own selection without its k."""
    kept_score: dict[str, Any] | None
    """The score by which chosen experts keep their weights among the own k; None if the model does not scale weights
    to sum to one, or by more than a score."""
    description: str
    """In words."""

    @property
    def mean_k(self) -> float:
        """Experts per token and layer."""
        return sum(self.k_L) / len(self.k_L)


def own_routing(handle: Handle) -> OwnRouting:
    """What the model does by itself.

    Raises:
        UserError: if its layers select in different ways.
    """
    readings = [block.reading for block in handle.blocks]
    selects = [_without_k(reading.select) for reading in readings]
    if any(select != selects[0] for select in selects):
        raise UserError(f"the layers of {type(handle.model).__name__} select in different ways: {selects}")
    return OwnRouting(
        layers=tuple(handle.routers),
        k_L=tuple(reading.k for reading in readings),
        num_experts_L=tuple(reading.num_experts for reading in readings),
        select=selects[0],
        kept_score=_kept_score(readings),
        description=str(readings[0]),
    )


def family_rule(family: Family, own: OwnRouting, budget_L: Sequence[float]) -> Rule:
    """The rule of a family with these experts per token for each layer."""
    if family.kept:
        select = {"name": "threshold"} if family.calibrated else own.select
        rule = Rule(select, own.kept_score, renormalize=False)
    else:
        rule = Rule(own.select) if family.integral else presets()[family.name].rule
    return replace(rule, budgets=tuple(float(budget) for budget in budget_L))


def _kept_score(readings: Sequence[Reading]) -> dict[str, Any] | None:
    first = readings[0]
    alike = len({(each.k, each.score, each.renormalize) for each in readings}) == 1
    # A bias moves choices away from the greatest scores, and belongs to the own score.
    plain = not any(each.bias or each.weighs or each.factor for each in readings)
    if not (alike and plain and first.renormalize and first.score.name in get_args(Of)):
        return None
    return {"name": "among_top", "k": first.k, "of": first.score.name}


def _without_k(select: Selection) -> dict[str, Any]:
    values = {field.name: getattr(select, field.name) for field in fields(select) if field.name != "k"}
    return {"name": select.name, **values}
