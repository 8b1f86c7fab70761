"""The gate with a hidden layer: two matrices and a tanh between them.

Legend: B batch, S sequence, D model width, E experts, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from crossways.gates.base import Gate, GateSpec, check_whole, router_product
from crossways.routing import Context


class MlpGate(Gate):
    """Logits W_2 tanh(W_1 x + b) (the router of sparse universal transformers, Tan et al. 2023, arXiv 2310.07096, as
    in the code that LibMoE carries; H = D there)."""

    def __init__(self, hidden_size: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.hidden_weight = nn.Parameter(torch.empty(width, hidden_size))
        self.bias = nn.Parameter(torch.empty(width))
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Matrices normal with the given standard deviation, bias zero."""
        nn.init.normal_(self.hidden_weight, std=std)
        nn.init.normal_(self.weight, std=std)
        nn.init.zeros_(self.bias)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """(B, S, D) to float32 logits (B, S, E)."""
        hidden_BSH = router_product(x_BSD, self.hidden_weight)
        return router_product((hidden_BSH + self.bias.to(hidden_BSH.dtype)).tanh(), self.weight)


@dataclass(frozen=True)
class Mlp(GateSpec):
    """Two matrices with a tanh between them."""

    name: ClassVar[str] = "mlp"

    width: int | None = None
    """Hidden width, at least 1; None is the model's."""

    def __post_init__(self) -> None:
        if self.width is not None:
            object.__setattr__(self, "width", check_whole(self.name, "width", self.width))

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> MlpGate:
        return MlpGate(hidden_size, num_experts, self.width or hidden_size)
