"""The order in which the loop backend walks the pairs: tiles of rows that fit the cache, cut into expert segments.

Legend: T tokens, P pairs, R rows (pairs plus padding rows), N rows of one tile, E experts, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from crossways.assignment import Assignment


@dataclass(frozen=True)
class Run:
    """Consecutive experts with equally many rows each: one batched matrix product."""

    expert: int
    """The first of them."""
    experts: int
    """How many."""
    rows: int
    """Rows of each."""
    first: bool = True
    """False for the second and later pieces of an expert that was cut; their weight gradients are added."""


@dataclass(frozen=True)
class Tile:
    """Consecutive rows whose scratch buffers are used together, and the runs they consist of, in order."""

    start: int
    stop: int
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class TilePlan:
    """An assignment laid out in rows. Without padding, row r is pair r."""

    tiles: tuple[Tile, ...]
    token_R: Tensor
    """Token of each row, int64. A padding row repeats a token, but `clear` makes it zero."""
    row_P: Tensor | None
    """Row of each pair; None when rows are pairs."""
    max_rows: int
    """Rows of the largest tile."""
    tokens: int
    """How many there are, with those that have no row."""
    idle_experts: tuple[int, ...]
    """Experts without a row, whose gradients are zero."""
    padding: tuple[Tensor, ...] = ()
    """Which rows of each tile are padding, counted from the tile's first; empty when rows are pairs."""

    def clear(self, index: int, rows_ND: Tensor) -> None:
        """Zero the padding among the rows of tile `index`: times a weight of zero, a token that is NaN would still be
        NaN, and reach experts that it did not choose."""
        if self.padding:
            rows_ND.index_fill_(0, self.padding[index], 0)  # a mask would be looked at for every element

    def spread(self, weight_P: Tensor) -> Tensor:
        """Routing weights (P,) as a column (R, 1); padding rows weigh nothing, so they contribute nothing."""
        if self.row_P is None:
            return weight_P[:, None]
        return weight_P.new_zeros(len(self.token_R)).index_copy_(0, self.row_P, weight_P)[:, None]

    @cached_property
    def by_token(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rows (P,) of all pairs, token by token; where each token's begin (T,); which pairs they are (P,)."""
        token_P = self.collect(self.token_R)
        key_P = token_P.to(torch.int16) if self.tokens < 2**15 else token_P  # narrow keys sort several times faster
        order_P = torch.sort(key_P, stable=True).indices
        count_T = torch.bincount(token_P, minlength=self.tokens)
        return order_P if self.row_P is None else self.row_P[order_P], count_T.cumsum(0) - count_T, order_P

    def collect(self, value_R: Tensor) -> Tensor:
        """The rows' values (R,) of the real pairs (P,)."""
        return value_R if self.row_P is None else value_R[self.row_P]


def round_up(rows: int, multiple: int) -> int:
    """To a multiple of `multiple`; of more rows to coarser ones, an eighth of a power of two, so that
    loads which differ from step to step come to few different shapes. Without a multiple (1), nothing is rounded."""
    if multiple > 1:
        multiple = max(multiple, 1 << max((rows - 1).bit_length() - 4, 0))
    return -(-rows // multiple) * multiple


def plan_tiles(
    assignment: Assignment, tile_rows: int, row_multiple: int = 1, call_rows: int = 0, alone: float = 1.0
) -> TilePlan:
    """Lay the pairs out in tiles of about `tile_rows` rows.

    Small experts share a tile, so that one elementwise call serves them all; an expert of more than `tile_rows`
    rows is cut, so that scratch memory does not grow with a hot expert.

    Args:
        assignment: the pairs.
        tile_rows: most rows of a tile.
        row_multiple: each expert's rows are rounded up (`round_up`), to keep the number of matrix shapes small.
        call_rows: a matrix product costs as much as this many rows before it starts. Neighbouring experts join one
            batched product when the padding that takes (to the largest load among them) costs less.
        alone: how many times as long a row takes in a product of one expert, which several threads share badly.
    """
    offsets = assignment.offsets_E1.tolist()
    loads = [stop - start for start, stop in pairwise(offsets)]
    cutting = _Cutting([round_up(load, row_multiple) for load in loads], tile_rows, call_rows, alone)
    runs = cutting.halves(0, len(loads))[1]
    rows = [0] * len(loads)
    for run in runs:
        for expert in range(run.expert, run.expert + run.experts):
            rows[expert] += run.rows
    tiles = _group(runs, tile_rows)
    token_R, row_P = assignment.token_P, None
    padding: tuple[Tensor, ...] = ()
    if rows != loads:
        token_R, row_P = _pad(assignment, torch.tensor(rows))
        padding = _padding(row_P, tiles)
    return TilePlan(
        tiles=tiles,
        token_R=token_R,
        row_P=row_P,
        max_rows=max((tile.stop - tile.start for tile in tiles), default=0),
        tokens=assignment.num_tokens,
        idle_experts=tuple(expert for expert, count in enumerate(rows) if count == 0),
        padding=padding,
    )


_MOST_PADDED = 2
"""Times the rows that experts have, with padding: that also passes through everything that is not a product, which
weighs most where matrices are small."""


@dataclass(frozen=True)
class _Cutting:
    """How the experts' loads (rows, rounded up already) are cut into runs."""

    loads: list[int]
    tile_rows: int
    call_rows: int
    alone: float

    def halves(self, first: int, count: int) -> tuple[float, list[Run]]:
        """Cost in rows, and runs, of `count` experts from `first` on: one product, or those of either half.

        Runs end up with 1, 2, 4, 8 ... experts but at the end of the list, so that few shapes occur, which matters
        where a shape seen for the first time has to be compiled; and work for an even number of threads is even.
        """
        widest = max(self.loads[first : first + count])
        if not widest:
            return 0, []
        if count == 1:
            return self.call_rows + self.alone * widest, self._pieces(first)
        left = 1 << (count - 1).bit_length() - 1
        cost, runs = self.halves(first, left)
        more_cost, more_runs = self.halves(first + left, count - left)
        padded = count * widest
        most = min(self.tile_rows, _MOST_PADDED * sum(self.loads[first : first + count]))
        if padded > most or self.call_rows + padded > cost + more_cost:
            return cost + more_cost, runs + more_runs
        return self.call_rows + padded, [Run(first, count, widest)]

    def _pieces(self, expert: int) -> list[Run]:
        load = self.loads[expert]
        pieces = range(0, load, self.tile_rows)
        return [Run(expert, 1, min(self.tile_rows, load - done), first=done == 0) for done in pieces]


def _group(runs: list[Run], tile_rows: int) -> tuple[Tile, ...]:
    """Pack consecutive runs into tiles."""
    tiles: list[Tile] = []
    start = stop = 0
    members: list[Run] = []
    for run in runs:
        size = run.experts * run.rows
        if members and stop - start + size > tile_rows:
            tiles.append(Tile(start, stop, tuple(members)))
            start, members = stop, []
        members.append(run)
        stop += size
    return (*tiles, Tile(start, stop, tuple(members))) if members else ()


def _pad(assignment: Assignment, rows_E: Tensor) -> tuple[Tensor, Tensor]:
    """Token of each row, and row of each pair, when experts' rows are rounded up."""
    shift_E = (rows_E.cumsum(0) - rows_E) - assignment.offsets_E1[:-1]
    row_P = torch.arange(assignment.num_pairs) + shift_E[assignment.expert_P]
    first_E = assignment.token_P[assignment.offsets_E1[:-1].clamp(max=assignment.num_pairs - 1)]
    token_R = first_E.repeat_interleave(rows_E)
    return token_R.index_copy_(0, row_P, assignment.token_P), row_P


def _padding(row_P: Tensor, tiles: tuple[Tile, ...]) -> tuple[Tensor, ...]:
    """The rows of each tile that are no pair's."""
    unused_R = torch.ones(tiles[-1].stop, dtype=torch.bool).index_fill_(0, row_P, False)
    return tuple(unused_R[tile.start : tile.stop].nonzero()[:, 0] for tile in tiles)
