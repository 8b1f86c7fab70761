"""The noisy gate: learnt noise on the logits while training.

Legend: B batch, S sequence, D model width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from crossways.gates.base import Gate, GateSpec, check_switch, router_product
from crossways.routing import Context, GateNoise, GateOutput


class NoisyGate(Gate):
    """Logits H(x)_i = (W x)_i + n_i softplus((W_noise x)_i), n_i standard normal (noisy top-k gating, Shazeer et al.
    2017, arXiv 1701.06538, eq. 4). In evaluation the noise is left out.

    Eq. 3 and 5 take softmax over the k chosen logits alone: that is `softmax`, `top_k` and `renormalize`. Both
    matrices start at zero (appendix A), so that training starts from balanced, purely random routing. The paper's
    two balancing losses are `importance_coef` and `load_coef`, not what `load_balance_coef` weighs; the second needs
    to know the noise, which the gate hands on.
    """

    def __init__(self, hidden_size: int, num_experts: int, zero_init: bool = True) -> None:
        super().__init__()
        self.zero_init = zero_init
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Zeros, or normal with the given standard deviation."""
        for parameter in (self.weight, self.noise_weight):
            nn.init.normal_(parameter, std=0.0 if self.zero_init else std)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor | GateOutput:
        """(B, S, D) to float32 logits (B, S, E), in training with their noise."""
        clean_BSE = router_product(x_BSD, self.weight)
        if not self.training:
            return clean_BSE
        spread_BSE = softplus(router_product(x_BSD, self.noise_weight))
        noisy_BSE = clean_BSE + torch.randn_like(clean_BSE) * spread_BSE
        return GateOutput(noisy_BSE, noise=GateNoise(clean_BSE, spread_BSE))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"hidden_size={self.weight.shape[1]}, num_experts={self.weight.shape[0]}"


@dataclass(frozen=True)
class Noisy(GateSpec):
    """A matrix for the logits and one for the scale of their noise."""

    name: ClassVar[str] = "noisy"

    zero_init: bool = True
    """Start both matrices at zero, as the paper does; otherwise from the model's normal initialisation."""

    def __post_init__(self) -> None:
        check_switch(self.name, "zero_init", self.zero_init)

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> NoisyGate:
        return NoisyGate(hidden_size, num_experts, self.zero_init)
