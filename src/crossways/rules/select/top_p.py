"""Top-p: every token takes its best experts until they hold a share p of its probability.

Legend: B batch, S sequence, E experts, T = B * S tokens, K = cap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import bits, routing
from crossways.rules.select.base import Selection, check_number, check_whole, top_k_index


@dataclass(frozen=True)
class TopP(Selection):
    """S_t = the fewest experts whose probabilities sum to at least p, taken from the greatest down, at most `cap`
    (Huang et al. 2024, arXiv 2403.07652, and its authors' code; the baseline of CartesianMoE, arXiv 2410.16077, with
    p = 0.4).

    An easy token, sure of its expert, takes one; a hard one takes several. At least one is always taken. The sum runs
    over the scores as they are, so p means a probability with `softmax` only; experts that must not be chosen lend
    the others no probability. CartesianMoE's cap was not found; without one a flat router executes pE experts.
    """

    name: ClassVar[str] = "top_p"
    causal = True
    batch_invariant = True

    p: float
    """Probability to reach, above 0 and at most 1; CartesianMoE's baseline uses 0.4."""
    cap: int | None = None
    """Most experts per token, 1 to E, or None for E; usually 2 to 8."""

    def __post_init__(self) -> None:
        check_number(self.name, "p", self.p)
        if not 0 < self.p <= 1:
            raise UserError(f"selection 'top_p': p must lie in (0, 1], got {self.p}")
        if self.cap is not None:
            object.__setattr__(self, "cap", check_whole(self.name, "cap", self.cap))

    @property
    def exact_budget(self) -> bool:
        """Only a cap of one leaves the content no say."""
        return self.cap == 1

    def check(self, num_experts: int) -> None:
        if self.cap is not None and self.cap > num_experts:
            raise UserError(f"selection 'top_p': cap = {self.cap} exceeds the {num_experts} experts")

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        num_experts = choice_BSE.shape[-1]
        if routing.fits(choice_BSE, allowed_BSE) and scores_BSE.dtype == torch.float32:
            most = min(self.cap or num_experts, num_experts)
            chosen = bits.of_top_p(choice_BSE, scores_BSE, most, self.p, allowed_BSE)
            return Assignment.from_bits(chosen, scores_BSE)
        choice_TE, scores_TE = choice_BSE.flatten(0, 1), scores_BSE.flatten(0, 1)
        allowed_TE = None if allowed_BSE is None else allowed_BSE.flatten(0, 1)
        index_TK = top_k_index(choice_TE, min(self.cap or num_experts, num_experts), allowed_TE)
        probs_TK = scores_TE.detach().gather(-1, index_TK)
        before_TK = functional.pad(probs_TK.cumsum(-1)[:, :-1], (1, 0))  # what the better experts hold already
        taken_TK = ~(before_TK >= self.p)  # unlike <, true after a NaN
        if self.cap is None:  # no bound is known that would be worth its indices
            mask_TE = torch.zeros_like(choice_TE, dtype=torch.bool).scatter(-1, index_TK, taken_TK)
            return Assignment.from_mask(mask_TE if allowed_TE is None else mask_TE & allowed_TE, scores_TE)
        return Assignment.from_choices(index_TK, scores_TE, taken_TK, allowed_TE)
