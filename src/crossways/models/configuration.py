"""`CrosswaysConfig`: a LLaMA-style model whose routing is plain JSON."""

# Without `from __future__ import annotations`: `strict` only checks types that are not strings.
import functools
import os
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from crossways.errors import UserError
from crossways.gates import build_gate
from crossways.models.checks import check_configuration
from crossways.models.fields import RoutingFields
from crossways.models.pointer import AUTO_MAP, POINTER_MODULE, POINTER_SOURCE
from crossways.rules.select import build_selection
from crossways.sharing import Repeated, Sharing, build_sharing

C = TypeVar("C", bound=type)


def user_errors(cls: C) -> C:
    """Class decorator: a constructor that says in one line, as `UserError`, what `strict` wraps in several."""
    construct = cls.__init__  # type: ignore[misc]

    @functools.wraps(construct)
    def constructor(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except StrictDataclassError as error:
            cause = error.__cause__
            message = " ".join(str(cause or error).split())
            raise UserError(message) from error

    cls.__init__ = constructor  # type: ignore[misc]
    return cls


@user_errors
@strict
class CrosswaysConfig(RoutingFields):
    """Configuration of `CrosswaysModel`: everything of `LlamaConfig`, and which layers are routed and how
    (`crossways.models.fields` says what each field does).

    Rules (`gate`, `score`, `select`, `sharing`) are a name or a dictionary `{"name": ..., field: value}`; they are
    stored as dictionaries. Raises `UserError` for an impossible combination.

    Saving also writes a module of two import lines and an `auto_map`, so that a program that knows only transformers
    can load the model with `trust_remote_code=True` wherever crossways is installed.
    """

    model_type = "crossways"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.select is None:
            self.select = {"name": "top_k", "k": 2}
        if self.attention_select is None:
            self.attention_select = {"name": "top_k", "k": 2}
        if self.attention_projections is None:
            self.attention_projections = ["value", "output"]
        for field in ("gate", "score", "select", "sharing", "attention_score", "attention_select"):
            if isinstance(spec := getattr(self, field), str):
                setattr(self, field, {"name": spec})
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Part of the `strict` validation: every value can be built, and fits the others."""
        super().validate_architecture()
        check_configuration(self)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """As in transformers, plus the module that leads the Auto classes to the installed package."""
        self.auto_map = dict(AUTO_MAP)
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{POINTER_MODULE}.py").write_text(POINTER_SOURCE, encoding="utf-8")
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoConfig") -> None:
        """Nothing to do: `save_pretrained` already says where the classes are, without copying their source."""

    @property
    def routed_layers(self) -> list[int]:
        """Indices of the routed layers, in order."""
        if self.moe_layers is not None:
            return list(self.moe_layers)
        return [i for i in range(self.num_hidden_layers) if self.moe_every and (i + 1) % self.moe_every == 0]

    @property
    def zero_computation_experts(self) -> int:
        """Zero, copy and constant experts together."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    @property
    def router_size(self) -> int:
        """Slots that a router chooses among: the feed-forward experts, the same subtracted if they may be, then the
        zero-computation ones."""
        return self.num_experts * (1 + self.negated_experts) + self.zero_computation_experts

    @property
    def logit_offsets(self) -> tuple[tuple[int, int, float], ...]:
        """First slot, the one after the last, and what is added to their logits; only where that is not nothing."""
        offsets = (
            (self.num_experts, 2 * self.num_experts, float(self.negated_logit_offset)),
            (*self.zero_slots, float(self.zero_logit_offset)),
        )
        return tuple(offset for offset in offsets if offset[2])

    @property
    def zero_slots(self) -> tuple[int, int]:
        """The first zero expert in a router's numbering, and the one after the last."""
        first = self.router_size - self.zero_computation_experts
        return first, first + self.zero_experts

    @property
    def num_groups(self) -> int:
        """Groups of experts that the device-level loss balances; 0 if nobody says."""
        return self.expert_groups or getattr(build_selection(self.select or "top_k"), "n_group", 0)

    @property
    def factors(self) -> int:
        """Routers per routed layer: `num_factors` in a Cartesian layer, else 1."""
        return self.num_factors if self.layer == "cartesian" else 1

    @property
    def gate_plan(self) -> list[tuple[int, ...]]:
        """Gate index of every router, a tuple per routed layer."""
        return self.sharing_plan.plan(len(self.routed_layers), self.factors)

    @property
    def rounds(self) -> int:
        """How often the model goes through its layers."""
        return self.num_hidden_layers // self.distinct_layers if self.distinct_layers else 1

    @property
    def sharing_plan(self) -> Sharing:
        """Which routed layers share a gate, in every round."""
        sharing: Sharing = build_sharing(self.sharing)
        if self.rounds == 1 or not self.routed_layers:
            return sharing
        return Repeated(sharing, len(self.routed_layers) // self.rounds)

    @property
    def scheduled(self) -> bool:
        """Whether the gate or the selection changes in the course of training."""
        return build_gate(self.gate).scheduled or build_selection(self.select or "top_k").scheduled

    @property
    def router_names(self) -> list[str]:
        """A name for every router, in the model's order: `layer 2`, or `layer 2 / factor 1`; layers count from 1."""
        return [
            f"layer {layer + 1}" + (f" / factor {factor + 1}" if self.factors > 1 else "")
            for layer in self.routed_layers
            for factor in range(self.factors)
        ]
