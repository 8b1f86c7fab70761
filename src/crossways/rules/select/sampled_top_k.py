"""Token choice whose last experts are drawn by lot while training.

Legend: B batch, S sequence, E experts, T = B * S tokens, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.rules.select.base import Selection, check_budget, check_whole
from crossways.rules.select.top_k import TopK

LEAST = 1e-6
"""What every score counts for at least in the draw, so that there is always someone to draw."""


@dataclass(frozen=True)
class SampledTopK(Selection):
    """Top-k; in training the last `sampled` of the k are drawn without replacement from the rest, in proportion to
    their scores (`sample_topk` of the sparse universal transformer, Tan et al. 2023, arXiv 2310.07096, as in the code
    that LibMoE carries). With `renormalize`, as there, weights sum to one."""

    name: ClassVar[str] = "sampled_top_k"
    causal = True
    batch_invariant = True
    exact_budget = True

    k: int
    """Experts per token, 1 to E."""
    sampled: int = 1
    """How many of them are drawn, 1 to k."""

    def __post_init__(self) -> None:
        for field in ("k", "sampled"):
            object.__setattr__(self, field, check_whole(self.name, field, getattr(self, field)))
        if self.sampled > self.k:
            raise UserError(f"selection 'sampled_top_k': sampled = {self.sampled} exceeds k = {self.k}")

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)

    def in_training(self) -> SampledTopK:
        return _Drawing(self.k, self.sampled)

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        return TopK(self.k)(choice_BSE, scores_BSE, allowed_BSE)


class _Drawing(SampledTopK):
    """The rule in training."""

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        # The greatest log p plus Gumbel noise are a draw in proportion to p without replacement.
        noise_BSE = torch.rand_like(scores_BSE).clamp(min=torch.finfo(scores_BSE.dtype).tiny).log().neg().log().neg()
        rank_BSE = scores_BSE.detach().clamp(min=LEAST).log() + noise_BSE
        if self.k > self.sampled:
            sure_TE = TopK(self.k - self.sampled)(choice_BSE, scores_BSE, allowed_BSE).to_mask()
            rank_BSE = rank_BSE.masked_fill(sure_TE.view_as(rank_BSE), torch.inf)
        return TopK(self.k)(rank_BSE, scores_BSE, allowed_BSE)
