"""Gates: modules that map hidden states to router logits. One file per idea; `base.Gate` is the contract."""

from crossways.gates.base import Gate, GateSpec, build_gate, gate_catalogue
from crossways.gates.linear import Linear, LinearGate

__all__ = ["Gate", "GateSpec", "Linear", "LinearGate", "build_gate", "gate_catalogue"]
