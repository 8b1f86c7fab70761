"""Gating residuals: the logits of the layer before are part of this layer's. The router of MoE++.

Legend: B batch, S sequence, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from crossways.gates.base import Gate, GateSpec, router_product
from crossways.routing import Context


class ResidualGate(Gate):
    """Logits G_l = W x + W_g G_(l-1), and G_1 = W x (MoE++, Jin et al. 2024, arXiv 2410.07348, eq. 6), so that
    a token's path so far has a say. In a Cartesian layer each factor reads the same factor of the layer before.

    Both matrices start as the model's other weights do. In the first routed layer W_g is multiplied by zeros: it gets
    a gradient of zero rather than none, which distributed training would trip over.
    """

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.residual = nn.Parameter(torch.empty(num_experts, num_experts))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal initialisation with the given standard deviation."""
        nn.init.normal_(self.weight, std=std)
        nn.init.normal_(self.residual, std=std)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """(B, S, D) to float32 logits (B, S, E)."""
        previous = None if context is None else context.previous
        logits_BSE = router_product(x_BSD, self.weight)
        before_BSE = torch.zeros_like(logits_BSE) if previous is None else previous.logits_TE.view_as(logits_BSE)
        return logits_BSE + router_product(before_BSE, self.residual)


@dataclass(frozen=True)
class Residual(GateSpec):
    """A matrix for the hidden state and one for the logits of the layer before (MoE++)."""

    name: ClassVar[str] = "residual"

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> ResidualGate:
        return ResidualGate(hidden_size, num_experts)
