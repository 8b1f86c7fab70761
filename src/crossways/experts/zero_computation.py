"""Zero-computation experts of MoE++: throw the token away, copy it, or blend it with a constant.

Legend: T tokens, P pairs, D model width, N constant experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from crossways.assignment import Assignment


class ZeroComputationExperts(nn.Module):
    """Experts that cost next to nothing, numbered zero, copy, constant (MoE++, Jin et al. 2024, arXiv 2410.07348,
    eq. 3-5): E_zero(x) = 0; E_copy(x) = x; E_const(x) = a_1 x + a_2 v with [a_1, a_2] = softmax(W_c x), v and W_c
    learnt, one pair for each constant expert.

    The router scores them beside the feed-forward experts; a simple token that goes here leaves room for others.
    """

    def __init__(self, hidden_size: int, zero: int = 0, copy: int = 0, constant: int = 0) -> None:
        """
        Args:
            hidden_size: D.
            zero: experts that return nothing; 1 in the paper.
            copy: experts that return their input; 1 in the paper.
            constant: experts that blend input and constant; 1 to 6 in the paper.
        """
        super().__init__()
        self.zero, self.copy, self.constant = zero, copy, constant
        if constant:  # empty ones would get no gradient, which distributed training trips over
            self.value = nn.Parameter(torch.empty(constant, hidden_size))
            self.blend = nn.Parameter(torch.empty(constant, 2, hidden_size))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """All of them."""
        return self.zero + self.copy + self.constant

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw every weight from a normal distribution of this standard deviation."""
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=std)

    def forward(self, x_TD: Tensor, assignment: Assignment) -> Tensor:
        """(T, D) to (T, D): each token's experts, weighted and summed.

        Args:
            x_TD: inputs.
            assignment: pairs of these experts, numbered from 0.
        """
        first = self.zero + self.copy
        copied_T1 = assignment.of_experts(self.zero, first).weight_sum_T()[:, None]
        y_TD = copied_T1.to(x_TD.dtype) * x_TD
        if not self.constant:
            return y_TD
        pairs = assignment.of_experts(first, self.num_experts)
        read_PD = x_TD[pairs.token_P]
        mix_P2 = torch.einsum("pd,pcd->pc", read_PD.float(), self.blend[pairs.expert_P].float()).softmax(-1)
        scaled_P2 = (mix_P2 * pairs.weight_P[:, None]).to(x_TD.dtype)
        constant_PD = functional.embedding(pairs.expert_P, self.value).to(x_TD.dtype)
        return y_TD.index_add(0, pairs.token_P, scaled_P2[:, :1] * read_PD + scaled_P2[:, 1:] * constant_PD)

    def extra_repr(self) -> str:
        """Their numbers."""
        return f"zero={self.zero}, copy={self.copy}, constant={self.constant}"
