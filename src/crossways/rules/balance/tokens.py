"""What every balancing loss needs: rows of valid tokens, and their mean.

Legend: T tokens, E experts, X any trailing size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def valid_rows(x_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """The rows of valid tokens; all of them when `valid_T` is None."""
    return x_TX if valid_T is None else x_TX[valid_T]


def mean_over_tokens(x_TX: Tensor) -> Tensor:
    """Mean over the first dimension; zero, not NaN, when it is empty."""
    return x_TX.sum(0) / max(x_TX.shape[0], 1)


def squared_variation(x_E: Tensor) -> Tensor:
    """CV(x)^2, squared standard deviation over squared mean, scalar: zero for equal entries and for zeros alone, and
    E - 1 when one entry holds everything."""
    mean = x_E.mean()
    return (x_E - mean).square().mean() / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)
