"""The CPU backend that needs no compiler: walk the experts over tiles of rows, in buffers that stay in the cache.

What costs time on a CPU besides the matrix products is fresh memory (page faults), elementwise passes over data that
has left the cache, and, in bfloat16, matrix shapes never seen before (oneDNN compiles a kernel for each) and products
of one expert, which two threads share badly. So: every product writes into a buffer reused by the next tile, and
whatever is large lies in memory that is used again (`pool`); rows are weighed and added up to tokens in one pass
(`row_sums`); gradients of all experts go straight into one (E, ...) tensor; experts of similar load are multiplied in
one call (`tiles`); bfloat16 rows are padded to few sizes; few of them go another way (`columns`).

Legend: T tokens, P pairs, R rows (see `tiles`), N rows of one tile, E experts, D model width, F expert width,
H rows of the first matrix (2F gated, F plain).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossways.assignment import Assignment
from crossways.experts import columns, pool
from crossways.experts.activation import Activation, BackwardOut
from crossways.experts.row_sums import RowSums
from crossways.experts.tiles import Tile, TilePlan, plan_tiles

_TILE_BYTES = 32 * 2**20
_MIN_TILE_ROWS = 512
_CALL_MULTIPLIES = {False: 8_000_000, True: 250_000_000}
"""Multiplications in the time that a product takes to start; by whether it is in half precision."""
_ALONE = {False: 1.2, True: 1.5}
"""Times that a product of one expert takes per row of what a batch takes; by the same."""


def loop(x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation) -> Tensor:
    """Same contract as `naive`; first derivatives only."""
    multiple = _row_multiple(x_TD.dtype)
    rows, call_rows = _tile_rows(up_EHD, down_EDF), _call_rows(up_EHD, down_EDF)
    plan = plan_tiles(assignment, rows, multiple, call_rows, _ALONE[multiple > 1])
    inputs = (x_TD, assignment.weight_P, up_EHD, down_EDF)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _Loop.apply(*inputs, plan, activation, save)


def _tile_rows(up_EHD: Tensor, down_EDF: Tensor) -> int:
    """As many rows as keep one tile's buffers within `_TILE_BYTES`, but enough for efficient products."""
    row_bytes = (2 * up_EHD.shape[2] + up_EHD.shape[1] + down_EDF.shape[2]) * up_EHD.element_size()
    return max(_MIN_TILE_ROWS, _TILE_BYTES // row_bytes // 32 * 32)


def _call_rows(up_EHD: Tensor, down_EDF: Tensor) -> int:
    """Rows that could be multiplied in the time that one more matrix product takes to start."""
    half = _row_multiple(up_EHD.dtype) > 1
    return _CALL_MULTIPLIES[half] // (up_EHD[0].numel() + down_EDF[0].numel())


def _row_multiple(dtype: torch.dtype) -> int:
    return 32 if dtype in (torch.bfloat16, torch.float16) else 1


class _Scratch:
    """Named row buffers, allocated once per call and cut to each tile's size."""

    def __init__(self, plan: TilePlan, like: Tensor) -> None:
        self._rows, self._like = plan.max_rows, like
        self._buffers: dict[str, Tensor] = {}

    def rows(self, name: str, count: int, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """The first `count` rows of the buffer `name` (rows, width)."""
        if name not in self._buffers:
            self._buffers[name] = pool.empty((self._rows, width), self._like, dtype)
        return self._buffers[name][:count]


def _gather(source_TD: Tensor, plan: TilePlan, index: int, scratch: _Scratch, name: str) -> Tensor:
    tile = plan.tiles[index]
    token_N = plan.token_R[tile.start : tile.stop]
    rows_ND = torch.index_select(source_TD, 0, token_N, out=scratch.rows(name, len(token_N), source_TD.shape[1]))
    plan.clear(index, rows_ND)
    return rows_ND


class _Loop(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_P: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        plan: TilePlan,
        activation: Activation,
        save: bool,
    ) -> Tensor:
        saved: list[Tensor] = []
        width = down_EDF.shape[2]
        up_EDH, down_EFD = up_EHD.transpose(1, 2), down_EDF.transpose(1, 2)
        scratch, sums = _Scratch(plan, x_TD), RowSums(plan, x_TD, weight_P)
        for index, tile in enumerate(plan.tiles):
            count = tile.stop - tile.start
            x_ND = _gather(x_TD, plan, index, scratch, "x")
            if not save and columns.pay(tile, x_TD.dtype):
                columns.forward(tile, x_ND, up_EHD, down_EDF, activation, sums.rows(tile))
                continue
            if save:
                up_NH = pool.empty((count, up_EHD.shape[1]), x_TD)
                saved.append(up_NH)
            else:
                up_NH = scratch.rows("up", count, up_EHD.shape[1])
            _mm_runs(tile, x_ND, up_EDH, up_NH)
            hidden_NF = scratch.rows("hidden", count, width)
            activation.apply_into(up_NH, hidden_NF)
            _mm_runs(tile, hidden_NF, down_EFD, sums.rows(tile))
        ctx.save_for_backward(x_TD, weight_P, up_EHD, down_EDF, *saved)
        ctx.plan, ctx.activation = plan, activation
        return sums.total()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weight_P, up_EHD, down_EDF, *saved = ctx.saved_tensors
        plan: TilePlan = ctx.plan
        activation: Activation = ctx.activation
        need_x, need_weight, need_up, need_down = ctx.needs_input_grad[:4]
        width = down_EDF.shape[2]
        grad_y_TD = grads[0].to(x_TD.dtype).contiguous()
        weight_R1 = plan.spread(weight_P.to(x_TD.dtype))
        grad_x = RowSums(plan, x_TD) if need_x else None
        grad_weight_R = x_TD.new_empty(len(plan.token_R)) if need_weight else None
        grad_up_EHD = _empty_grad(up_EHD, plan) if need_up else None
        grad_down_EDF = _empty_grad(down_EDF, plan) if need_down else None
        scratch = _Scratch(plan, x_TD)
        for index, (tile, up_NH) in enumerate(zip(plan.tiles, saved, strict=True)):
            rows = slice(tile.start, tile.stop)
            count = tile.stop - tile.start
            grad_y_ND = _gather(grad_y_TD, plan, index, scratch, "grad_y")
            grad_hidden_NF = scratch.rows("grad_hidden", count, width)
            _mm_runs(tile, grad_y_ND, down_EDF, grad_hidden_NF)
            out = BackwardOut(
                hidden_PF=scratch.rows("hidden", count, width),
                grad_up_PH=scratch.rows("grad_up", count, up_EHD.shape[1]),
                grad_weight_P=None if grad_weight_R is None else grad_weight_R[rows],
                scratch_PF=scratch.rows("scratch", count, width),
            )
            activation.backward_into(grad_hidden_NF, weight_R1[rows], up_NH, out)
            if grad_down_EDF is not None:
                _mm_weight_grads(tile, grad_y_ND, out.hidden_PF, grad_down_EDF)
            if grad_up_EHD is not None:
                x_ND = _gather(x_TD, plan, index, scratch, "x")
                _mm_weight_grads(tile, out.grad_up_PH, x_ND, grad_up_EHD)
            if grad_x is not None:
                _mm_runs(tile, out.grad_up_PH, up_EHD, grad_x.rows(tile))
        return (
            None if grad_x is None else grad_x.total(),
            None if grad_weight_R is None else plan.collect(grad_weight_R).to(weight_P.dtype),
            grad_up_EHD,
            grad_down_EDF,
            None,
            None,
            None,
        )


def _empty_grad(weight: Tensor, plan: TilePlan) -> Tensor:
    grad = pool.empty(weight.shape, weight)
    for expert in plan.idle_experts:
        grad[expert].zero_()
    return grad


def _mm_runs(tile: Tile, rows_NI: Tensor, matrix_EIO: Tensor, out_NO: Tensor) -> None:
    """Each run's rows times their experts' matrices."""
    start = 0
    for run in tile.runs:
        stop = start + run.experts * run.rows
        rows, out = rows_NI[start:stop], out_NO[start:stop]
        if run.experts == 1:
            torch.mm(rows, matrix_EIO[run.expert], out=out)
        else:
            shape = (run.experts, run.rows, -1)
            experts = matrix_EIO[run.expert : run.expert + run.experts]
            torch.bmm(rows.view(shape), experts, out=out.view(shape))
        start = stop


def _mm_weight_grads(tile: Tile, left_NI: Tensor, right_NO: Tensor, grad_EIO: Tensor) -> None:
    """Each expert's left^T right (I, O), stored as (or, for a later piece, added to) its gradient."""
    start = 0
    for run in tile.runs:
        stop = start + run.experts * run.rows
        left, right = left_NI[start:stop], right_NO[start:stop]
        if run.experts > 1:
            shape = (run.experts, run.rows, -1)
            grads = grad_EIO[run.expert : run.expert + run.experts]
            torch.bmm(left.view(shape).transpose(1, 2), right.view(shape), out=grads)
        elif run.first:
            torch.mm(left.t(), right, out=grad_EIO[run.expert])
        else:
            grad_EIO[run.expert].addmm_(left.t(), right)
        start = stop
