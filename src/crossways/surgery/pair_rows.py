"""One row per chosen pair, for experts that want the same number of pairs for every token.

Legend: T tokens, D model width, K most experts of a token, P chosen pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairRows:
    """Which tokens the rows that experts get are of."""

    token_P: Tensor
    """int64 (P,)."""
    shape: torch.Size
    """Of the tokens, without D."""

    def summed(self, output_PD: Tensor) -> Tensor:
        """The rows of each token summed up, in float32 as a 16-bit sum would lose digits: (*shape, D)."""
        wide_PD = output_PD.reshape(len(self.token_P), -1)
        wide_PD = wide_PD.float() if output_PD.dtype in (torch.float16, torch.bfloat16) else wide_PD
        summed_TD = wide_PD.new_zeros(self.shape.numel(), output_PD.shape[-1]).index_add(0, self.token_P, wide_PD)
        return summed_TD.to(output_PD.dtype).reshape(*self.shape, -1)


def one_row_per_pair(
    x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor, num_places: int
) -> tuple[PairRows, Tensor, Tensor, Tensor] | None:
    """What experts are to be given instead of (x_TD, index_TK, weight_TK): x (P, D), index and weight (P, 1); or None
    if every place is taken, so that they may have it as it is.

    Args:
        x_TD: hidden states (..., D), the dimensions before D together T.
        index_TK: experts; from `num_places` on, an empty place.
        weight_TK: their weights.
        num_places: experts that there are.
    """
    taken_TK = index_TK < num_places
    if bool(taken_TK.all()):
        return None
    token_P = taken_TK.nonzero()[:, 0]
    expert_P, weight_P = index_TK[taken_TK], weight_TK[taken_TK]
    if not len(token_P):  # no pair at all: experts need a row, and a weight of zero makes it nothing
        token_P, expert_P, weight_P = token_P.new_zeros(1), expert_P.new_zeros(1), weight_P.new_zeros(1)
    x_PD = x_TD.reshape(-1, x_TD.shape[-1])[token_P]
    return PairRows(token_P, x_TD.shape[:-1]), x_PD, expert_P[:, None], weight_P[:, None]
