"""The low-rank gate: layers share a matrix and differ by a thin correction.

Legend: B batch, S sequence, D model width, E experts, L layers that share the gate, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from crossways.gates.base import Gate, GateSpec, check_whole, router_product
from crossways.routing import Context


class LowRankGate(Gate):
    """Logits (W_0 + U_l V_l) x with W_0 shared by L layers and U_l (E, R), V_l (R, D) of each layer's own
    (LowRank-MoE, a baseline of PathMoE, Gu et al. 2026, arXiv 2603.18297).

    The paper's rank, scope of sharing and initialisation are unknown to us; the form is our reading of its
    description. The sharing plan sets the scope. U_l starts at zero, so training starts from plain sharing (and V_l
    gets its first gradient in the second step).
    """

    def __init__(self, hidden_size: int, num_experts: int, num_layers: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.up_LER = nn.Parameter(torch.empty(num_layers, num_experts, rank))
        self.down_LRD = nn.Parameter(torch.empty(num_layers, rank, hidden_size))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Normal with the given standard deviation, but for U, which is zero."""
        nn.init.normal_(self.weight, std=std)
        nn.init.normal_(self.down_LRD, std=std)
        nn.init.zeros_(self.up_LER)

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Tensor:
        """(B, S, D) to float32 logits (B, S, E), with the term of `context.layer`."""
        layer = 0 if context is None else context.layer
        thin_BSR = router_product(x_BSD, self.down_LRD[layer])
        return router_product(x_BSD, self.weight) + router_product(thin_BSR, self.up_LER[layer])

    def weights_per_token(self) -> int:
        """The shared matrix and one layer's term."""
        return self.weight.numel() + self.up_LER[0].numel() + self.down_LRD[0].numel()


@dataclass(frozen=True)
class LowRank(GateSpec):
    """A matrix shared by the layers of a block, plus a low-rank term for each."""

    name: ClassVar[str] = "low_rank"

    rank: int = 8
    """Rank of each layer's term, at least 1 and usefully below the number of experts; customary 4 to 16."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", check_whole(self.name, "rank", self.rank))

    def build(self, hidden_size: int, num_experts: int, num_layers: int = 1, vocab_size: int = 0) -> LowRankGate:
        return LowRankGate(hidden_size, num_experts, num_layers, self.rank)
