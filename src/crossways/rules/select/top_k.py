"""Token choice: every token takes its k best experts.

Legend: B batch, S sequence, E experts, T = B * S tokens, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crossways.assignment import Assignment
from crossways.native import bits, routing
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
        if routing.fits(choice_BSE, allowed_BSE):
            return Assignment.from_bits(bits.of_top_k(choice_BSE, self.k, allowed_BSE), scores_BSE)
        num_experts = choice_BSE.shape[-1]
        choice_TE, scores_TE = choice_BSE.reshape(-1, num_experts), scores_BSE.reshape(-1, num_experts)
        allowed_TE = None if allowed_BSE is None else allowed_BSE.reshape(-1, num_experts)
        index_TK = top_k_index(choice_TE, self.k, allowed_TE)
        return Assignment.from_choices(index_TK, scores_TE, allowed_TE=allowed_TE)
