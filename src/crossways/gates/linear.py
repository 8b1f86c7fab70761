"""The linear gate, used by nearly every published MoE.

Legend: B batch, S sequence, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from crossways.gates.base import Gate, GateSpec, check_switch, router_product
from crossways.routing import Context


class LinearGate(Gate):
    """Logits W x (Shazeer et al. 2017, arXiv 1701.06538, eq. 2, without the noise), or W x + b.

    The product is computed in float32 whatever the dtype of the model, under autocast too.
    """

    def __init__(self, hidden_size: int, num_experts: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights normal with the given standard deviation, bias zero."""
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """(B, S, D) to float32 logits (B, S, E)."""
        logits_BSE = router_product(x_BSD, self.weight)
        return logits_BSE if self.bias is None else logits_BSE + self.bias.to(logits_BSE.dtype)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"hidden_size={self.weight.shape[1]}, num_experts={self.weight.shape[0]}"


@dataclass(frozen=True)
class Linear(GateSpec):
    """One matrix."""

    name: ClassVar[str] = "linear"

    bias: bool = False
    """Add a learnt number per expert; nearly nobody does, the SMoE of USMoE's authors' code does."""

    def __post_init__(self) -> None:
        check_switch(self.name, "bias", self.bias)

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> LinearGate:
        return LinearGate(hidden_size, num_experts, self.bias)
