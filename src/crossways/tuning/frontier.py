"""The settings that are compared, and quality against cost of each.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from crossways.errors import UserError
from crossways.surgery.rule import Rule
from crossways.tuning.allocate import allocate, predicted_loss
from crossways.tuning.bench import Bench, Estimates
from crossways.tuning.compare import Difference, paired_difference
from crossways.tuning.cost import PairCosts
from crossways.tuning.families import FAMILIES, OWN, Family, OwnRouting, family_rule
from crossways.tuning.score import Scored
from crossways.tuning.sensitivity import Sensitivity, measure_sensitivities
from crossways.tuning.settings import TuningSettings
from crossways.tuning.texts import Text

Allocation = Literal["own", "uniform", "per-layer"]


@dataclass(frozen=True)
class Setting:
    """One way to route at given budgets."""

    family: str
    """Name of the family, `own` for the model as it is."""
    allocation: Allocation
    """Whether all layers are cut alike, or by their sensitivities."""
    rule: Rule
    budget_L: tuple[float, ...]
    """Experts per token that each layer aims at."""
    predicted: float | None = None
    """Nats per token that a per-layer allocation expected to lose against its family at the model's own budgets."""

    @property
    def leaky(self) -> bool:
        """Whether it looks at later tokens."""
        return self.family != OWN and FAMILIES[self.family].leaky

    @property
    def label(self) -> str:
        """For readers."""
        family = "the model as it is" if self.family == OWN else FAMILIES[self.family].label
        return family if self.allocation == "own" else f"{family}, {self.allocation} budgets"


@dataclass(frozen=True)
class Point:
    """A setting that was measured."""

    setting: Setting
    estimates: Estimates | None
    scored: Scored
    difference: Difference
    """From the original, on the same text."""
    flops: float
    """Executed expert FLOPs per token."""


def own_setting(own: OwnRouting) -> Setting:
    """The model as it is, watched."""
    return Setting(OWN, "own", Rule(), tuple(float(k) for k in own.k_L))


def uniform_settings(family: Family, own: OwnRouting, shares: Sequence[float]) -> list[Setting]:
    """Every layer at the same share of its own budget; at every whole number below it, where it must be whole."""
    if family.integral:
        budgets = [tuple(float(min(k, most)) for most in own.k_L) for k in range(1, max(own.k_L))]
    else:
        budgets = [tuple(share * k for k in own.k_L) for share in shares]
    return [Setting(family.name, "uniform", family_rule(family, own, each), each) for each in budgets]


def per_layer_settings(
    family: Family,
    own: OwnRouting,
    shares: Sequence[float],
    sensitivities: Sequence[Sensitivity],
    costs: PairCosts,
) -> list[Setting]:
    """The same budgets, spent where they are missed most. One that no layer's smallest level allows is left out."""
    found: dict[tuple[float, ...], Setting] = {}
    for share in shares:
        if share >= 1.0:
            continue
        spent = share * sum(k * c for k, c in zip(own.k_L, costs.pair_L, strict=True)) / sum(costs.pair_L)
        try:
            budget_L = allocate(sensitivities, spent, costs.pair_L, integral=family.integral)
        except UserError:
            continue
        setting = Setting(family.name, "per-layer", family_rule(family, own, budget_L), budget_L)
        found[budget_L] = replace(setting, predicted=predicted_loss(sensitivities, budget_L))
    return list(found.values())


def sensitivities_of(
    bench: Bench, families: Sequence[Family], own: OwnRouting, settings: TuningSettings, text: Text
) -> dict[str, tuple[Sensitivity, ...]]:
    """By the family they were measured under; some families share them."""
    names = dict.fromkeys(family.sensitivities_of or family.name for family in families)
    return {name: measure_sensitivities(bench, FAMILIES[name], own, settings.levels, text) for name in names}


def all_settings(
    families: Sequence[Family],
    own: OwnRouting,
    settings: TuningSettings,
    sensitivities: Mapping[str, Sequence[Sensitivity]],
    costs: PairCosts,
) -> list[Setting]:
    """What the frontier is drawn of."""
    found = []
    for family in families:
        known = sensitivities[family.sensitivities_of or family.name]
        uniform = uniform_settings(family, own, settings.budgets)
        taken = {setting.budget_L for setting in uniform}
        per_layer = per_layer_settings(family, own, settings.budgets, known, costs)
        found += uniform + [setting for setting in per_layer if setting.budget_L not in taken]
    return found


def measure(
    bench: Bench, setting: Setting, text: Text, costs: PairCosts, original: Scored | None, settings: TuningSettings
) -> Point:
    """Calibrate what must be, and score. Without `original`, the setting is its own."""
    calibrated = setting.family != OWN and FAMILIES[setting.family].calibrated
    estimates = bench.calibrated(setting.rule) if calibrated else None
    return point_of(setting, estimates, bench.score(setting.rule, estimates, text), costs, original, settings)


def point_of(
    setting: Setting,
    estimates: Estimates | None,
    scored: Scored,
    costs: PairCosts,
    original: Scored | None,
    settings: TuningSettings,
) -> Point:
    """A score as a point: its difference from the original, and its cost."""
    difference = paired_difference(
        scored,
        original or scored,
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    return Point(setting, estimates, scored, difference, costs.per_token(scored.executed_L))
