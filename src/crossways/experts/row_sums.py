"""Adding rows up to their tokens, weighed or not, in at least float32.

`embedding_bag` goes through the tokens one after the other, in all threads, and keeps a token's sum in registers; a
row's weight costs it nothing. It needs all rows in one tensor. Where that were very large, some rows at a time are
widened and added to sums that lie in memory, which takes longer.

Legend: T tokens, P pairs, R rows (see `tiles`), N rows of one tile, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from crossways.experts import pool
from crossways.experts.tiles import Tile, TilePlan

_MOST_BYTES = 512 * 2**20
"""Of the rows of all tiles, to be added at once."""
_SOME_BYTES = 16 * 2**20
"""Of the widened rows, where they are added some at a time."""


class RowSums:
    """What the tiles compute for rows, added up to what is computed for tokens.

    Args:
        plan: the tiles, which are to be written in their order.
        like_TD: of the shape and dtype of the result.
        weight_P: what each pair's row is multiplied by; None for 1.
    """

    def __init__(self, plan: TilePlan, like_TD: Tensor, weight_P: Tensor | None = None) -> None:
        self._plan, self._like_TD = plan, like_TD
        self._weight_P = None if weight_P is None else weight_P.to(like_TD.dtype)
        self._first = self._stop = 0  # the rows that wait to be added
        rows, width = len(plan.token_R), like_TD.shape[1]
        wide = torch.promote_types(like_TD.dtype, torch.float32)
        self._sum_TD: Tensor | None = None
        if rows * width * like_TD.element_size() > _MOST_BYTES:
            rows = max(plan.max_rows, _SOME_BYTES // (width * wide.itemsize))
            self._sum_TD = torch.zeros(like_TD.shape, dtype=wide)
            self._weight_R1 = None if weight_P is None else plan.spread(weight_P.to(like_TD.dtype))
            self._wide_ND = pool.empty((rows, width), like_TD, wide)
        self._rows_ND = pool.empty((rows, width), like_TD)

    def rows(self, tile: Tile) -> Tensor:
        """Where this tile's rows (N, D) are to be written, before the next tile's are asked for."""
        if tile.stop - self._first > len(self._rows_ND):
            self._add()
        self._stop = tile.stop
        return self._rows_ND[tile.start - self._first : tile.stop - self._first]

    def total(self) -> Tensor:
        """The sums (T, D), when every tile has been written; zero for a token that has no row."""
        if self._sum_TD is not None:
            self._add()
            return self._sum_TD.to(self._like_TD.dtype)
        row_P, first_T, order_P = self._plan.by_token
        if not len(row_P):
            return torch.zeros_like(self._like_TD)
        weight_P = None if self._weight_P is None else self._weight_P[order_P]
        return functional.embedding_bag(row_P, self._rows_ND, first_T, mode="sum", per_sample_weights=weight_P)

    def _add(self) -> None:
        assert self._sum_TD is not None  # with all rows at once, none has to make room
        rows = slice(self._first, self._stop)
        wide_ND = self._wide_ND[: self._stop - self._first].copy_(self._rows_ND[: self._stop - self._first])
        if self._weight_R1 is not None:
            wide_ND.mul_(self._weight_R1[rows])
        self._sum_TD.index_add_(0, self._plan.token_R[rows], wide_ND)
        self._first = self._stop
