"""Sigmoid of each logit by itself: experts do not compete for one unit of probability.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crossways.rules.score.base import Score


@dataclass(frozen=True)
class Sigmoid(Score):
    """s = sigmoid(W x), elementwise, in [0, 1] (sigma-MoE, Csordas et al. 2023, arXiv 2310.10837, section 5;
    DeepSeek-V3, arXiv 2412.19437, eq. 15)."""

    name: ClassVar[str] = "sigmoid"

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        return logits_BSE.sigmoid()
