"""Token choice: every token takes its k best experts.

Legend: B batch, S sequence, E experts, T = B * S tokens, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.rules.select.base import Selection, check_budget, check_whole, top_k_index


@dataclass(frozen=True)
class TopK(Selection):
    """S_t = the k experts of greatest score of token t (Shazeer et al. 2017, arXiv 1701.06538, eq. 3-5).

    k = 1 is the routing of Switch Transformers (arXiv 2101.03961, eq. 1-2).
    """

    name: ClassVar[str] = "top_k"
    causal = True
    batch_invariant = True
    exact_budget = True

    k: int
    """Experts per token, 1 to E; usually 1 to 8."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_whole(self.name, "k", self.k))

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        num_experts = choice_BSE.shape[-1]
        choice_TE, scores_TE = choice_BSE.reshape(-1, num_experts), scores_BSE.reshape(-1, num_experts)
        if allowed_BSE is None:
            index_TK = top_k_index(choice_TE, self.k)
            return Assignment.from_topk(index_TK, scores_TE.gather(-1, index_TK), num_experts)
        allowed_TE = allowed_BSE.reshape(-1, num_experts)
        index_TK = top_k_index(choice_TE.masked_fill(~allowed_TE, -torch.inf), self.k)
        # What is not allowed goes to one more expert, whose pairs are then left out.
        expert_TK = torch.where(allowed_TE.gather(-1, index_TK), index_TK, num_experts)
        everything = Assignment.from_topk(expert_TK, scores_TE.gather(-1, index_TK), num_experts + 1)
        return everything.of_experts(0, num_experts)
