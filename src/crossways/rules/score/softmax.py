"""Softmax over experts, the score of token choice.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crossways.rules.score.base import Score


@dataclass(frozen=True)
class Softmax(Score):
    """p = softmax(W x) over the experts (Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, eq. 1).

    Scores of one token sum to one.
    """

    name: ClassVar[str] = "softmax"

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        return logits_BSE.softmax(-1)
