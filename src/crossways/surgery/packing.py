"""Sequences that were packed into one row, told apart by positions that start again.

Legend: B batch, S sequence, T = B S tokens, N packed sequences, L longest of them, X any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossways.assignment import Assignment


@dataclass(frozen=True)
class Packing:
    """A row for each sequence, filled up with padding, instead of the rows that a pass has."""

    place_T: Tensor
    """Where each token is among the N L places, int64 (T,), increasing."""
    rows: int
    """N."""
    length: int
    """L."""

    def valid_NL(self) -> Tensor:
        """Boolean (N, L): which places hold a token."""
        return self.spread(torch.ones_like(self.place_T, dtype=torch.bool)).view(self.rows, self.length)

    def spread(self, value_TX: Tensor) -> Tensor:
        """Each token's numbers (T, X) at its place, zero elsewhere, (N L, X)."""
        places = value_TX.new_zeros(self.rows * self.length, *value_TX.shape[1:])
        return places.index_copy(0, self.place_T.to(places.device), value_TX)

    def gather(self, value_PX: Tensor) -> Tensor:
        """The reverse of `spread`."""
        return value_PX[self.place_T.to(value_PX.device)]

    def spread_pairs(self, pairs: Assignment) -> Assignment:
        """Pairs of tokens as pairs of places."""
        place_P = self.place_T.to(pairs.token_P.device)[pairs.token_P]
        return replace(pairs, token_P=place_P, num_tokens=self.rows * self.length)

    def gather_pairs(self, pairs: Assignment) -> Assignment:
        """The reverse of `spread_pairs`; order is kept, as places increase with tokens."""
        tokens = torch.arange(len(self.place_T), device=pairs.token_P.device)
        return replace(pairs, token_P=self.spread(tokens)[pairs.token_P], num_tokens=len(tokens))


def find_packing(position_ids: object, rows: int, length: int) -> Packing | None:
    """How sequences are packed, as transformers' own masks tell it: a new one starts wherever a position is not the
    one before plus one. None if every row is one sequence, or positions are given in another shape than (B, S) or
    (1, S)."""
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or position_ids.shape[1] != length:
        return None
    position_BS = position_ids.expand(rows, length)
    starts_BS = torch.ones_like(position_BS, dtype=torch.bool)
    starts_BS[:, 1:] = position_BS.diff(dim=1) != 1
    if not bool(starts_BS[:, 1:].any()):
        return None
    sequence_T = starts_BS.flatten().cumsum(0) - 1
    count_N = torch.bincount(sequence_T)
    longest = int(count_N.max())
    first_N = count_N.cumsum(0) - count_N
    offset_T = torch.arange(rows * length, device=first_N.device) - first_N[sequence_T]
    return Packing(sequence_T * longest + offset_T, len(count_N), longest)
