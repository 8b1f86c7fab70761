"""The ways to route that are compared, each a rule that lacks only its budgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from crossways.errors import UserError
from crossways.rules.select import Selection
from crossways.surgery.handle import Handle
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


FAMILIES = {
    family.name: family
    for family in (
        Family("token-choice", "token choice, the model's own rule", integral=True),
        Family("usmoe", "USMoE, global budget", leaky=True, sensitivities_of="usmoe-threshold"),
        Family("usmoe-threshold", "USMoE's causal twin", calibrated=True),
        Family("threshold", "threshold on the model's own score", calibrated=True),
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
    description: str
    """In words."""

    @property
    def mean_k(self) -> float:
        """Experts per token and layer."""
        return sum(self.k_L) / len(self.k_L)


def own_routing(handle: Handle) -> OwnRouting:
    """What the model does by itself.

    Raises:
        UserError: if its layers select in different ways, or its experts compute every pair anyway.
    """
    readings = [block.reading for block in handle.blocks]
    if any(reading.hands_over == "dense" for reading in readings):
        raise UserError(
            f"{type(handle.model).__name__}: this family's experts compute every pair, chosen or not, so no budget "
            "saves anything"
        )
    selects = [_without_k(reading.select) for reading in readings]
    if any(select != selects[0] for select in selects):
        raise UserError(f"the layers of {type(handle.model).__name__} select in different ways: {selects}")
    return OwnRouting(
        layers=tuple(handle.routers),
        k_L=tuple(reading.k for reading in readings),
        num_experts_L=tuple(reading.num_experts for reading in readings),
        select=selects[0],
        description=str(readings[0]),
    )


def family_rule(family: Family, own: OwnRouting, budget_L: Sequence[float]) -> Rule:
    """The rule of a family with these experts per token for each layer."""
    rule = Rule(own.select) if family.name == "token-choice" else presets()[family.name].rule
    return replace(rule, budgets=tuple(float(budget) for budget in budget_L))


def _without_k(select: Selection) -> dict[str, Any]:
    values = {field.name: getattr(select, field.name) for field in fields(select) if field.name != "k"}
    return {"name": select.name, **values}
