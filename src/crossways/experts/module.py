"""`Experts`: the stacked weights of one layer's experts. (Being replaced by the fast version.)"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.naive import naive


class Experts(nn.Module):
    """E feed-forward networks in transformers' stacked layout."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.activation, self.backend = Activation(activation), backend
        rows = intermediate_size * (2 if self.activation.gated else 1)
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, rows, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        return naive(x_TD, assignment, self.gate_up_proj, self.down_proj, self.activation)
