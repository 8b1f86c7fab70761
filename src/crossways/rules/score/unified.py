"""The unified score of USMoE.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crossways.errors import UserError
from crossways.rules.score.base import Score


@dataclass(frozen=True)
class Unified(Score):
    """u = alpha * softmax(s) + (1 - alpha) * 2 * sigmoid(s) / E (USMoE, arXiv 2503.22996, definition 3.2).

    The two parts are the score of token choice and that of expert choice; their form and alpha = 0.5 are those of
    the authors' published code. The factor 2 / E puts both on one scale: each is 1 / E at logits of zero. The sigmoid
    part's row sum is not one, so scores of one token sum to one only on average.
    """

    name: ClassVar[str] = "unified"

    alpha: float = 0.5
    """Share of the softmax part, 0 to 1; 1 is plain softmax, 0 plain scaled sigmoid. The authors use 0.5."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0:
            raise UserError(f"score 'unified': alpha must lie in [0, 1], got {self.alpha}")

    def __call__(self, logits_BSE: Tensor) -> Tensor:
        token_choice_BSE = logits_BSE.softmax(-1)
        expert_choice_BSE = logits_BSE.sigmoid() * (2.0 / logits_BSE.shape[-1])
        if self.alpha == 1.0:  # exactly softmax, not softmax plus a zero that rounds or carries an infinity's NaN
            return token_choice_BSE
        return self.alpha * token_choice_BSE + (1.0 - self.alpha) * expert_choice_BSE
