"""The contract of a gate: a module with the parameters, and the value that describes it in a configuration.

Legend: B batch, S sequence, D model width, E experts, L layers that share the gate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from crossways.errors import UserError
from crossways.routing import Context, GateOutput
from crossways.rules.registry import build, catalogue
from crossways.rules.select import Selection


class Gate(nn.Module):
    """Owns a router's parameters; shared gates are one module used by several routers."""

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise, with the model's standard deviation where that makes sense. With functions that leave alone
        what a checkpoint has filled: `torch.nn.init`, and `transformers.initialization` for the rest."""
        raise NotImplementedError

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor | GateOutput:
        """Hidden states (B, S, D) to float32 logits (B, S, E), or to a `GateOutput`; to float64 logits if the hidden
        states are float64, which a router in that dtype sees to."""
        raise NotImplementedError

    @property
    def wants_counts(self) -> bool:
        """Whether it cannot route before `count_tokens`; a saved gate that has counted knows them."""
        return False

    def count_tokens(self, counts_V: Tensor) -> None:
        """Learn how often each token id occurs in the training text, int64 (V,), before the first step. For gates
        that are made from it (`GateSpec.counts_tokens`); nothing happens by default."""

    def weights_per_token(self) -> int:
        """Weights that one layer's pass multiplies a token by, for counting operations; by default all matrices."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.dim() > 1)


@dataclass(frozen=True)
class GateSpec:
    """A kind of gate and its settings, as plain values."""

    name: ClassVar[str]
    """What selects the gate in a configuration."""
    scheduled: ClassVar[bool] = False
    """Whether the gate changes in the course of training, so that the model must count its steps."""

    @property
    def counts_tokens(self) -> bool:
        """Whether the gate must be told how often each token id occurs before it can route."""
        return False

    def check(self, num_experts: int, select: Selection | None = None) -> None:
        """Raise `UserError` if the gate cannot work with this many experts or with this selection."""

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> Gate:
        """A fresh module for D = hidden_size, E = num_experts and V = vocab_size, asked by `num_layers` layers.

        V is 0 where nobody said; gates that need it then raise `UserError`.
        """
        raise NotImplementedError


def gate_catalogue() -> dict[str, type[GateSpec]]:
    """Every kind of gate by name."""
    return catalogue(GateSpec, "crossways.gates")


def build_gate(spec: str | Mapping[str, Any]) -> GateSpec:
    """A gate's description from its name or its fields; raises `UserError` for an unknown one."""
    return build(GateSpec, spec, gate_catalogue(), what="gate")


def check_whole(gate: str, field: str, value: Any, least: int = 1) -> int:
    """The field as an int (2.0 in a recipe means 2); raises `UserError` unless it is whole and at least `least`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or value < least or value % 1 != 0:
        raise UserError(f"gate {gate!r}: {field} must be a whole number of at least {least}, got {value!r}")
    return int(value)


def check_positive(gate: str, field: str, value: Any) -> None:
    """Raise `UserError` unless the field is a finite number above zero."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise UserError(f"gate {gate!r}: {field} must be a number above 0, got {value!r}")


def check_switch(gate: str, field: str, value: Any) -> None:
    """Raise `UserError` unless the field is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"gate {gate!r}: {field} must be true or false, got {value!r}")


def check_vocabulary(gate: str, vocab_size: int) -> int:
    """V; raises `UserError` if nobody said what it is."""
    if vocab_size < 1:
        raise UserError(f"gate {gate!r} has one entry per token id: build it with vocab_size, got {vocab_size}")
    return vocab_size


def required_token_ids(gate: str, context: Context | None) -> Tensor:
    """Token ids (B, S); raises `UserError` if the router was given none."""
    if context is None or context.token_ids_BS is None:
        raise UserError(
            f"gate {gate!r} routes by token id, and there are none: call the model with input_ids instead of "
            "inputs_embeds"
        )
    return context.token_ids_BS


def router_float(x: Tensor) -> Tensor:
    """`x` in the dtype that routers work in: float64 stays, anything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def router_product(x_BSD: Tensor, weight_ED: Tensor) -> Tensor:
    """x W^T in float32 whatever the dtype of the model, under autocast too: a selection is a comparison, and bfloat16
    logits tie. In float64 where the router hands its input over so. (..., D) and (E, D) to (..., E)."""
    x_BSD = router_float(x_BSD)
    with maybe_autocast(x_BSD.device.type, enabled=False):
        return nn.functional.linear(x_BSD, weight_ED.to(x_BSD.dtype))
