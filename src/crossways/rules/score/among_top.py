"""Scores that sum to one over a token's k best experts, however many of them are then chosen.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from crossways.errors import UserError
from crossways.rules.score.base import Score
from crossways.rules.score.sigmoid import Sigmoid
from crossways.rules.score.softmax import Softmax
from crossways.rules.score.sqrt_softplus import SqrtSoftplus

Of = Literal["softmax", "sigmoid", "sqrt_softplus"]


@dataclass(frozen=True)
class AmongTop(Score):
    """s_te = r_te / sum of the k greatest r of token t, with r the score named by `of`.

    These are the weights of a model that takes its k best experts and scales them to sum to one. Chosen from without
    `renormalize`, fewer experts keep the weights they had among k, so what is left out is left out; scaling them anew
    would make the rest louder, which a model that was never trained so may not bear.
    """

    name: ClassVar[str] = "among_top"

    k: int = 2
    """Experts whose scores sum to one, 1 to E; those that the model was trained with."""
    of: Of = "softmax"
    """The score that is scaled."""

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or self.k != int(self.k) or self.k < 1:
            raise UserError(f"score 'among_top': k must be a whole number from 1 up, got {self.k}")
        object.__setattr__(self, "k", int(self.k))
        if self.of not in get_args(Of):
            raise UserError(f"score 'among_top': of must be one of {get_args(Of)}, got {self.of!r}")

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        raw = {"softmax": Softmax, "sigmoid": Sigmoid, "sqrt_softplus": SqrtSoftplus}[self.of]()
        scores_BSE = raw(logits_BSE)
        return scores_BSE / scores_BSE.topk(min(self.k, scores_BSE.shape[-1]), dim=-1).values.sum(-1, keepdim=True)
