"""Few rows an expert in bfloat16: products whose left operand is the expert's matrix as it lies.

oneDNN repacks the right operand of a product. With few rows that is better done to the rows than to the matrix, so
the first product is `up @ x^T`, and what comes of it stays so, one column a row, until the second product. That has
the rows on the left again: what it writes is added up by rows.

Legend: N rows of a tile, B experts of a run, M rows of each of them, E experts, D model width, F expert width, H rows
of the first matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.experts import pool
from crossways.experts.activation import Activation
from crossways.experts.tiles import Tile

_MOST_ROWS = 256
"""Of an expert; with more, repacking the matrix hardly counts."""


def pay(tile: Tile, dtype: torch.dtype) -> bool:
    """Whether this is the faster way for a tile."""
    return dtype in (torch.bfloat16, torch.float16) and all(run.rows <= _MOST_ROWS for run in tile.runs)


def forward(
    tile: Tile,
    x_ND: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: Activation,
    out_ND: Tensor,
) -> None:
    """down(activation(up(x))) of a tile's rows, written to `out_ND`; not differentiable."""
    start = 0
    for run in tile.runs:
        rows = slice(start, start := start + run.experts * run.rows)
        experts, shape = slice(run.expert, run.expert + run.experts), (run.experts, run.rows, -1)
        up_BHM = pool.empty((run.experts, up_EHD.shape[1], run.rows), x_ND)
        torch.bmm(up_EHD[experts], x_ND[rows].view(shape).mT, out=up_BHM)
        hidden_BMF = pool.empty((run.experts, down_EDF.shape[2], run.rows), x_ND).mT
        activation.apply_into(up_BHM.mT, hidden_BMF)
        torch.bmm(hidden_BMF, down_EDF[experts].mT, out=out_ND[rows].view(shape))
