"""ReLU of each logit: the score of ReMoE.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from crossways.rules.score.base import Score


@dataclass(frozen=True)
class Relu(Score):
    """s = max(0, W x), elementwise (ReMoE, Wang et al. 2024, arXiv 2412.14711, section 3.2, eq. 5).

    With the selection `positive` the layer is continuous in the logits. A logit below zero gets no gradient, so an
    expert that no token wants stays unwanted: ReMoE starts dense and lets its penalty grow slowly.
    """

    name: ClassVar[str] = "relu"

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        return logits_BSE.relu()
