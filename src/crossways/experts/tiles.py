"""The order in which the loop backend walks the pairs: tiles of rows that fit the cache, cut into expert segments.

Legend: T tokens, P pairs, R rows (pairs plus padding rows), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    idle_experts: tuple[int, ...]
    """Experts without a row, whose gradients are zero."""
    padding_R: Tensor | None = None
    """Boolean, true for padding rows; None when rows are pairs."""

    def clear(self, tile: Tile, rows_ND: Tensor) -> None:
        """Zero the padding among a tile's rows: times a weight of zero, a token that is NaN would still be NaN, and
        reach experts that it did not choose."""
        if self.padding_R is not None:
            rows_ND.masked_fill_(self.padding_R[tile.start : tile.stop, None], 0)

    def spread(self, weight_P: Tensor) -> Tensor:
        """Routing weights (P,) as a column (R, 1); padding rows weigh nothing, so they contribute nothing."""
        if self.row_P is None:
            return weight_P[:, None]
        return weight_P.new_zeros(len(self.token_R)).index_copy_(0, self.row_P, weight_P)[:, None]

    def collect(self, value_R: Tensor) -> Tensor:
        """The rows' values (R,) of the real pairs (P,)."""
        return value_R if self.row_P is None else value_R[self.row_P]


def plan_tiles(assignment: Assignment, tile_rows: int, row_multiple: int = 1, call_rows: int = 0) -> TilePlan:
    """Lay the pairs out in tiles of about `tile_rows` rows.

    Small experts share a tile, so that one elementwise call serves them all; an expert of more than `tile_rows`
    rows is cut, so that scratch memory does not grow with a hot expert.

    Args:
        assignment: the pairs.
        tile_rows: most rows of a tile.
        row_multiple: each expert's rows are rounded up to it, to keep the number of distinct matrix shapes small.
        call_rows: a matrix product costs as much as this many rows before it starts. Neighbouring experts join one
            batched product when the padding that takes (to the largest load among them) costs less.
    """
    offsets = assignment.offsets_E1.tolist()
    loads = [stop - start for start, stop in pairwise(offsets)]
    runs = _cut([-(-load // row_multiple) * row_multiple for load in loads], tile_rows, call_rows)
    rows = [0] * len(loads)
    for run in runs:
        for expert in range(run.expert, run.expert + run.experts):
            rows[expert] += run.rows
    token_R, row_P, padding_R = assignment.token_P, None, None
    if rows != loads:
        token_R, row_P = _pad(assignment, torch.tensor(rows))
        padding_R = torch.ones(len(token_R), dtype=torch.bool).index_fill_(0, row_P, False)
    tiles = _group(runs, tile_rows)
    return TilePlan(
        tiles=tiles,
        token_R=token_R,
        row_P=row_P,
        max_rows=max((tile.stop - tile.start for tile in tiles), default=0),
        idle_experts=tuple(expert for expert, count in enumerate(rows) if count == 0),
        padding_R=padding_R,
    )


def _cut(loads: list[int], tile_rows: int, call_rows: int) -> list[Run]:
    """Greedily join neighbours into runs while padding costs less than another call."""
    runs: list[Run] = []
    first, count, rows = 0, 0, 0
    for expert, load in enumerate(loads):
        widest = max(rows, load)
        joined, apart = (count + 1) * widest, count * rows + load + call_rows
        if count and joined <= min(apart, tile_rows):
            count, rows = count + 1, widest
            continue
        if count:
            runs.append(Run(first, count, rows))
        count = 0
        if load > tile_rows:
            pieces = range(0, load, tile_rows)
            runs += [Run(expert, 1, min(tile_rows, load - done), first=done == 0) for done in pieces]
        elif load:
            first, count, rows = expert, 1, load
    if count:
        runs.append(Run(first, count, rows))
    return runs


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
