"""What every balancing loss needs: the mean over valid tokens.

Legend: T tokens, E experts, X any trailing size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def without_padding(x_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Zero for padding, and no gradient. Not left out: counting what remains would wait for the device."""
    return x_TX if valid_T is None else x_TX.where(valid_T.view(-1, *(1,) * (x_TX.dim() - 1)), 0.0)


def num_valid(x_TX: Tensor, valid_T: Tensor | None) -> Tensor | int:
    """Tokens that are not padding, at least 1."""
    return max(x_TX.shape[0], 1) if valid_T is None else valid_T.sum().clamp(min=1)


def mean_over_tokens(x_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over the valid tokens; zero, not NaN, when there are none."""
    return without_padding(x_TX, valid_T).sum(0) / num_valid(x_TX, valid_T)


def squared_variation(x_E: Tensor) -> Tensor:
    """CV(x)^2, squared standard deviation over squared mean, scalar: zero for equal entries and for zeros alone, and
    E - 1 when one entry holds everything."""
    mean = x_E.mean()
    return (x_E - mean).square().mean() / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)
