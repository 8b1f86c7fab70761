"""The random gate: drawn once, never learnt. A floor for every learnt router.

Legend: B batch, S sequence, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from crossways.gates.base import Gate, GateSpec, check_positive, router_product
from crossways.routing import Context


class RandomGate(Gate):
    """Logits W x with a W that is drawn at initialisation and then fixed (Rand-MoE of PathMoE, arXiv 2603.18297;
    the router of SMoE-Dropout, Chen et al. 2023, arXiv 2303.01610).

    W is a buffer: no optimizer sees it, weight decay does not shrink it, and it is saved and loaded. Gradients still
    reach x through the weights of the chosen experts. The papers do not give the scale of W (SMoE-Dropout's code has
    its library's default); ours is the model's, times `scale`.
    """

    weight: Tensor

    def __init__(self, hidden_size: int, num_experts: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("weight", torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal, with `scale` times the given standard deviation."""
        nn.init.normal_(self.weight, std=std * self.scale)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """(B, S, D) to float32 logits (B, S, E)."""
        return router_product(x_BSD, self.weight)

    def weights_per_token(self) -> int:
        """The fixed matrix costs what a learnt one does."""
        return self.weight.numel()


@dataclass(frozen=True)
class Random(GateSpec):
    """One fixed random matrix, no bias."""

    name: ClassVar[str] = "random"

    scale: float = 1.0
    """Standard deviation of the matrix in units of the model's initialisation, above 0; sharper routing above 1."""

    def __post_init__(self) -> None:
        check_positive(self.name, "scale", self.scale)

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> RandomGate:
        return RandomGate(hidden_size, num_experts, self.scale)
