"""Positive: every expert with a score above zero runs. The selection of ReMoE.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crossways.assignment import Assignment
from crossways.native import bits, routing
from crossways.rules.select.base import Selection


@dataclass(frozen=True)
class Positive(Selection):
    """S_t = {e: score[t, e] > 0} (ReMoE, Wang et al. 2024, arXiv 2412.14711, eq. 5: y = sum_e ReLU(W x)_e
    FFN_e(x)).

    Meant for the score `relu`, which is zero where it is not positive: the output is then continuous in the logits,
    since an expert enters and leaves with weight zero. The budget follows the scores; ReMoE steers it with the
    adaptive penalty of `crossways.rules.balance.sparsity_loss`. A token may take no expert.
    """

    name: ClassVar[str] = "positive"
    causal = True
    batch_invariant = True
    exact_budget = False

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        if routing.fits(choice_BSE, allowed_BSE):
            chosen = bits.of_cutoff(choice_BSE, 0.0, allowed_BSE, above=True)
            return Assignment.from_bits(chosen, scores_BSE)
        mask_BSE = ~(choice_BSE <= 0)  # unlike >, true for a NaN score
        if allowed_BSE is not None:
            mask_BSE = mask_BSE & allowed_BSE
        return Assignment.from_mask(mask_BSE.flatten(0, 1), scores_BSE.flatten(0, 1))
