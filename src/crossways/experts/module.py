"""`Experts`: the parameters of all experts of one layer, in transformers' standard layout.

Legend: T tokens, E experts, D model width, F expert width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.biased import Biases
from crossways.experts.compute import backends, compute_experts


class Experts(nn.Module):
    """E feed-forward networks, held as two stacked tensors so that checkpoints of transformers' MoEs convert.

    Gated activations have `gate_up_proj` (E, 2F, D), gate rows first; plain ones `up_proj` (E, F, D); both have
    `down_proj` (E, D, F). With biases they have `gate_up_proj_bias` (E, 2F) or `up_proj_bias` (E, F), and
    `down_proj_bias` (E, D), which start at zero.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
        backend: str = "auto",
        bias: bool = False,
    ) -> None:
        """
        Args:
            num_experts: E.
            hidden_size: D.
            intermediate_size: F, of each expert.
            activation: swiglu, geglu, reglu, silu, gelu or relu.
            backend: `auto` or one of `crossways.experts.backends()`; whether it can run is known at the first call.
            bias: whether both products add a bias (gpt-oss; `moe.bias` of sigma-MoE's code).

        Raises:
            ValueError: for an unknown activation or backend, or a size below 1.
        """
        super().__init__()
        if min(num_experts, hidden_size, intermediate_size) < 1:
            raise ValueError(f"sizes must be at least 1, got {(num_experts, hidden_size, intermediate_size)}")
        if backend not in ("auto", *backends()):
            raise ValueError(f"unknown experts backend {backend!r}; choose auto or one of {', '.join(backends())}")
        self.activation, self.backend = Activation(activation), backend
        rows = intermediate_size * (2 if self.activation.gated else 1)
        up = nn.Parameter(torch.empty(num_experts, rows, hidden_size))
        self.register_parameter(self._up_name, up)
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        if bias:
            self.register_parameter(f"{self._up_name}_bias", nn.Parameter(torch.empty(num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.has_bias = bias
        self.reset_parameters()

    @property
    def _up_name(self) -> str:
        return "gate_up_proj" if self.activation.gated else "up_proj"

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw every weight from a normal distribution of this standard deviation; biases are zero."""
        for name, parameter in self.named_parameters():
            nn.init.normal_(parameter, std=0.0 if name.endswith("_bias") else std)

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """(T, D) to (T, D): each token's experts, weighted and summed."""
        up_EHD, biases = getattr(self, self._up_name), None
        if self.has_bias:
            biases = Biases(getattr(self, f"{self._up_name}_bias"), self.down_proj_bias)
        return compute_experts(x_TD, assignment, up_EHD, self.down_proj, self.activation, self.backend, biases)

    def extra_repr(self) -> str:
        """Sizes, activation and backend."""
        experts, hidden, width = self.down_proj.shape
        bias = ", bias=True" if self.has_bias else ""
        return f"{experts} x {hidden} -> {width}, activation={self.activation.name}, backend={self.backend}{bias}"
