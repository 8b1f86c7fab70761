"""Square root of the softplus of each logit: between the sigmoid, which saturates, and the ReLU, which is zero.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from crossways.rules.score.base import Score


@dataclass(frozen=True)
class SqrtSoftplus(Score):
    """s = sqrt(softplus(W x)), elementwise, unbounded (`sqrtsoftplus` of Megatron-core 0.20; we know no
    paper). Like `sigmoid` it goes with `renormalize` and a bias that balances.
    """

    name: ClassVar[str] = "sqrt_softplus"

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        soft_BSE = softplus(logits_BSE)
        # One that rounds to zero has an infinite slope under the root.
        return torch.where(soft_BSE > 0, soft_BSE.clamp(min=torch.finfo(soft_BSE.dtype).tiny).sqrt(), soft_BSE)
