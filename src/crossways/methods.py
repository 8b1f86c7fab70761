"""Published routing methods by name: what selects each, and what its rules declare. The list is `methods.yaml`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml
from pydantic import Field

from crossways.errors import UserError
from crossways.gates import build_gate
from crossways.layers import CartesianMoE, MoE
from crossways.models import CrosswaysConfig
from crossways.rules.registry import describe, nearest
from crossways.rules.score import build_score
from crossways.rules.select import build_selection
from crossways.settings import Settings
from crossways.sharing import build_sharing


class Method(Settings):
    """One entry of the list."""

    title: str
    """The name as its authors write it."""
    paper: str
    """Where it comes from: authors, year, arXiv number."""
    equation: str
    """Equation, section, table or figure that defines it."""
    model: dict[str, Any]
    """What a recipe says under `model:` to select it; sizes are for the small reference model of the list."""
    note: str = ""
    """What to know before comparing: readings of what a paper leaves open, and what is left out."""


class _Methods(Settings):
    reference: dict[str, Any] = Field(min_length=1)
    methods: dict[str, Method]


@dataclass(frozen=True)
class MethodProperties:
    """What the rules of a configuration declare."""

    causal: bool
    """A later token never changes an earlier token's experts."""
    batch_invariant: bool
    """Another row of the batch never changes mine."""
    exact_budget: bool
    """The number of executed experts does not depend on the content of the text."""
    decode_twin: str
    """What generation decides by instead; empty for a rule that is causal and batch-invariant."""


def methods() -> dict[str, Method]:
    """Every method by name, in the order of the list."""
    return _read().methods


def find_method(name: str) -> Method:
    """One method; raises `UserError`, naming the nearest, for an unknown one."""
    known = methods()
    if name not in known:
        raise UserError(f"unknown method {name!r}{nearest(name, list(known))}; known: {', '.join(known)}")
    return known[name]


def reference_sizes() -> dict[str, Any]:
    """The small reference model that the entries of the list are written for."""
    return _read().reference


def method_config(method: Method, **sizes: Any) -> CrosswaysConfig:
    """The small reference model with this method's routing; keyword arguments replace fields.

    Raises:
        UserError: for a combination that cannot be built.
    """
    return CrosswaysConfig(**(reference_sizes() | method.model | sizes))


def method_properties(config: CrosswaysConfig) -> MethodProperties:
    """What the configured score and selection declare, together."""
    score, select = build_score(config.score), build_selection(config.select or "top_k")
    twins = [describe(rule.decode_twin()) for rule in (select, score) if rule.decode_twin() is not rule]
    return MethodProperties(
        causal=score.causal and select.causal,
        batch_invariant=score.batch_invariant and select.batch_invariant,
        exact_budget=select.exact_budget,
        decode_twin=" of ".join(twins),
    )


def method_parts(config: CrosswaysConfig) -> dict[str, tuple[str, str]]:
    """The parts a configuration is made of: gate, score, select, sharing, layer; each on one line, and the docstring
    that explains it."""
    gate = build_gate(config.gate)
    built = gate.build(config.hidden_size, config.router_size, 1, config.vocab_size)
    values: Mapping[str, Any] = {
        "score": build_score(config.score),
        "select": build_selection(config.select or "top_k"),
        "sharing": build_sharing(config.sharing),
    }
    layer = CartesianMoE if config.layer == "cartesian" else MoE
    return {
        "gate": (describe(gate), inspect.getdoc(type(built)) or ""),
        **{name: (describe(value), inspect.getdoc(type(value)) or "") for name, value in values.items()},
        "layer": (config.layer, inspect.getdoc(layer) or ""),
    }


def recipe_lines(method: Method) -> str:
    """The YAML that selects a method in a recipe."""
    fields = {
        name: yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000)
        for name, value in method.model.items()
    }
    return "\n".join(["model:", *(f"  {name}: {text.splitlines()[0]}" for name, text in fields.items())])


def _read() -> _Methods:
    text = resources.files("crossways").joinpath("methods.yaml").read_text(encoding="utf-8")
    return _Methods(**yaml.safe_load(text))
