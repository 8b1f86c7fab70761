"""The contract of a gate: a module with the parameters, and the value that describes it in a configuration.

Legend: B batch, S sequence, D model width, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from crossways.routing import Context
from crossways.rules.registry import build, catalogue


class Gate(nn.Module):
    """Owns a router's parameters; shared gates are one module used by several routers."""

    def reset_parameters(self, std: float = 0.02) -> None:
        """Initialise, with the model's standard deviation where that makes sense."""
        raise NotImplementedError

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Hidden states (B, S, D) to float32 logits (B, S, E).

        A recurrent gate also returns the state that it finds in `context.previous.state` in the next layer.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class GateSpec:
    """A kind of gate and its settings, as plain values."""

    name: ClassVar[str]
    """What selects the gate in a configuration."""

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1) -> Gate:
        """A fresh module for D = hidden_size and E = num_experts, used by `num_layers` layers."""
        raise NotImplementedError


def gate_catalogue() -> dict[str, type[GateSpec]]:
    """Every kind of gate by name."""
    return catalogue(GateSpec, "crossways.gates")


def build_gate(spec: str | Mapping[str, Any]) -> GateSpec:
    """A gate's description from its name or its fields; raises `UserError` for an unknown one."""
    return build(GateSpec, spec, gate_catalogue(), what="gate")
