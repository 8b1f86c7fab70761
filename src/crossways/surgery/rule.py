"""What to route by: a value that composes, and travels in a model's configuration as plain JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

from crossways.errors import UserError
from crossways.rules.registry import nearest
from crossways.rules.score import build_score
from crossways.rules.select import build_selection, selection_catalogue
from crossways.surgery.ragged import Experts

Spec = str | Mapping[str, Any]
"""A rule's name, or `{"name": ..., field: value, ...}`."""


@dataclass(frozen=True)
class Rule:
    """How to route. What is None stays as the family has it."""

    select: Mapping[str, Any] | None = None
    """The selection; its `k`, where it has one and none is given, is the family's own number of experts per token."""
    score: Mapping[str, Any] | None = None
    """The score. With another score than the family's own, the family's balancing bias is left out: it was learnt on
    the other's scale."""
    renormalize: bool | None = None
    """Scale each token's weights to sum to one."""
    weight_scale: float | None = None
    """Factor on all weights."""
    budgets: tuple[float, ...] | None = None
    """Experts per token of each routed layer, instead of one `k` for all."""
    experts: Experts | None = None
    """Who computes the chosen pairs: `own`, what the model computes its experts by; `crossways`, our expert compute
    wherever the experts' layout allows; None, ours where it is known to be faster and nobody chose another."""

    def __post_init__(self) -> None:
        if self.experts is not None and self.experts not in get_args(Experts):
            raise UserError(f"experts must be one of {', '.join(get_args(Experts))}, got {self.experts!r}")
        if self.select is not None:
            self.selection(1)
        if self.score is not None:
            build_score(self.score)
        if self.budgets is not None and (self.select is None or "k" not in _fields(self.select)):
            raise UserError("budgets are for selections with a k (experts per token); give such a selection")

    def selection(self, k: float) -> Any:
        """The selection, with `k` experts per token where it has a k and none is given."""
        assert self.select is not None
        spec = dict(self.select)
        if "k" in _fields(spec):
            spec.setdefault("k", k)
        return build_selection(spec)

    def of_layer(self, index: int) -> Rule:
        """The rule of one routed layer: its own budget in the selection."""
        if self.budgets is None:
            return self
        assert self.select is not None
        return replace(self, select={**self.select, "k": self.budgets[index]}, budgets=None)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, only what is set."""
        entries = {
            "select": dict(self.select) if self.select is not None else None,
            "score": dict(self.score) if self.score is not None else None,
            "renormalize": self.renormalize,
            "weight_scale": self.weight_scale,
            "budgets": list(self.budgets) if self.budgets is not None else None,
            "experts": self.experts,
        }
        return {name: value for name, value in entries.items() if value is not None}

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Rule:
        """The reverse of `to_json`; raises `UserError` for anything else."""
        unknown = set(entries) - set(cls.__dataclass_fields__)
        if unknown:
            raise UserError(f"a rule has no {sorted(unknown)}; it has {sorted(cls.__dataclass_fields__)}")
        budgets = entries.get("budgets")
        return cls(**{**entries, "budgets": tuple(budgets) if budgets is not None else None})


@dataclass(frozen=True)
class Preset:
    """A rule by name."""

    rule: Rule
    summary: str
    """One line."""
    source: str = ""
    """Paper."""
    needs: tuple[str, ...] = field(default=())
    """Fields that must be given."""


USMOE = "USMoE, Do et al. 2025, arXiv 2503.22996"


def presets() -> dict[str, Preset]:
    """Every preset by name."""
    unified = {"name": "unified", "alpha": 0.5}
    return {
        "own": Preset(Rule(), "the family's own routing, unchanged: for tracing and perturbing"),
        "token-choice": Preset(Rule({"name": "top_k"}), "each token takes its k best experts"),
        "expert-choice": Preset(
            Rule({"name": "expert_choice"}), "each expert takes its best tokens", "Zhou et al. 2022, arXiv 2202.09368"
        ),
        "usmoe": Preset(
            Rule({"name": "top_c"}, unified), "unified score, one budget for all pairs of a sequence", USMOE
        ),
        "usmoe-batch": Preset(
            Rule({"name": "top_c", "group": "batch"}, unified), "unified score, one budget for the whole batch", USMOE
        ),
        "usmoe-threshold": Preset(
            Rule({"name": "threshold"}, unified),
            "unified score above a calibrated cutoff: USMoE's causal twin",
            USMOE,
        ),
        "top-c": Preset(Rule({"name": "top_c"}), "the family's score, one budget for all pairs of a sequence", USMOE),
        "threshold": Preset(Rule({"name": "threshold"}), "the family's score above a calibrated cutoff"),
        "top-p": Preset(
            Rule({"name": "top_p", "p": 0.4}),
            "each token takes experts up to a share of probability",
            "Huang et al. 2024, arXiv 2403.07652",
        ),
    }


def build_rule(
    rule: str | Rule | Mapping[str, Any] | None = None,
    *,
    select: Spec | None = None,
    score: Spec | None = None,
    k: float | Sequence[float] | None = None,
    renormalize: bool | None = None,
    weight_scale: float | None = None,
    experts: Experts | None = None,
) -> Rule:
    """A rule from a preset's name, a rule or its JSON, with whatever else is given put in its place.

    Args:
        rule: a preset's name, a `Rule`, what `Rule.to_json` made, or None for the family's own.
        select: a selection by name or by its fields.
        score: a score by name or by its fields.
        k: experts per token; one number, or one for each routed layer. Fractions are allowed where the selection
            allows them.
        renormalize: whether a token's weights sum to one.
        weight_scale: factor on all weights.
        experts: who computes the chosen pairs, `own` or `crossways`.

    Raises:
        UserError: for an unknown preset or rule, naming the nearest known one, or fields that do not fit.
    """
    if isinstance(rule, str):
        known = presets()
        if rule not in known:
            raise UserError(f"unknown preset {rule!r}{nearest(rule, list(known))}; known: {', '.join(known)}")
        rule = known[rule].rule
    base = rule if isinstance(rule, Rule) else Rule.from_json(rule or {})
    changes: dict[str, Any] = {}
    if select is not None:
        changes["select"] = _spec(select)
    if score is not None:
        changes["score"] = _spec(score)
    if renormalize is not None:
        changes["renormalize"] = renormalize
    if weight_scale is not None:
        changes["weight_scale"] = weight_scale
    if experts is not None:
        changes["experts"] = experts
    base = replace(base, **changes)
    return base if k is None else _with_k(base, k)


def _with_k(rule: Rule, k: float | Sequence[float]) -> Rule:
    if rule.select is None or "k" not in _fields(rule.select):
        raise UserError(f"k is given, but {rule.select or 'the own rule'} has no k; give a selection that has one")
    if isinstance(k, int | float):
        return replace(rule, select={**rule.select, "k": k}, budgets=None)
    return replace(rule, budgets=tuple(float(each) for each in k))


def _spec(spec: Spec) -> dict[str, Any]:
    return {"name": spec} if isinstance(spec, str) else dict(spec)


def _fields(spec: Mapping[str, Any]) -> tuple[str, ...]:
    kind = selection_catalogue().get(str(spec.get("name")))
    return tuple(kind.__dataclass_fields__) if kind is not None else ()
