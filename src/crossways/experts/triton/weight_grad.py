"""grad_e = sum over e's pairs of left[p] right[p]^T, the gradient of an expert's matrix.

One of the two factors is read through the pairs' tokens, so neither inputs nor output gradients are ever permuted in
memory. Each program walks over one expert's segment, so however hot an expert, as many programs sum it as its matrix
has blocks.

Legend: T tokens, P pairs, E experts, I rows and J columns of the matrix.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from crossways.experts.triton.configs import prune_weight_grads, weight_grad_configs
from crossways.experts.triton.launch import Products
from crossways.experts.triton.tiling import multiple, multiply
from crossways.experts.triton.timing import milliseconds


def weight_grads(
    left: Tensor, right: Tensor, token_P: Tensor, offsets_E1: Tensor, products: Products, gathered: str
) -> Tensor:
    """The gradients (E, I, J); zero for experts without pairs.

    Args:
        left: (P, I), or (T, I) when it is the one that is gathered; the elements of a row follow each other.
        right: (P, J), or (T, J), likewise.
        token_P: token of each pair.
        offsets_E1: first pair of each expert, and the end of the last.
        products: from `products_for`.
        gathered: `left` or `right`.
    """
    experts, rows, columns = offsets_E1.numel() - 1, left.shape[1], right.shape[1]
    out_EIJ = left.new_empty(experts, rows, columns)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (experts * triton.cdiv(rows, meta["BLOCK_I"]) * triton.cdiv(columns, meta["BLOCK_J"]),)

    weight_grad_kernel[grid](
        *(left, right, token_P, offsets_E1, out_EIJ, left.stride(0), right.stride(0), rows, columns),
        GATHER_LEFT=gathered == "left",
        ALIGN=gcd(16, left.stride(0), right.stride(0), rows, columns),
        LOAD=products.load,
        UPCAST=products.upcast,
        PRECISION=products.precision,
    )
    return out_EIJ


@triton.autotune(
    weight_grad_configs(),
    key=["ROWS", "COLUMNS", "GATHER_LEFT", "LOAD"],
    prune_configs_by={"early_config_prune": prune_weight_grads},
    do_bench=milliseconds,
)
@triton.jit
def weight_grad_kernel(
    left_ptr,
    right_ptr,
    token_ptr,
    offsets_ptr,
    out_ptr,
    stride_l,
    stride_r,
    ROWS,
    COLUMNS,
    GATHER_LEFT: tl.constexpr,
    ALIGN: tl.constexpr,
    LOAD: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A block of one expert's gradient; programs of one expert follow each other, since they read the same rows.

    `LOAD` is for the tuner alone: what is fastest for three pairs is not for three thousand.
    """
    stride_l, stride_r = multiple(stride_l, ALIGN), multiple(stride_r, ALIGN)
    ROWS, COLUMNS = multiple(ROWS, ALIGN), multiple(COLUMNS, ALIGN)
    blocks_j = tl.cdiv(COLUMNS, BLOCK_J)
    blocks = tl.cdiv(ROWS, BLOCK_I) * blocks_j
    expert, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i = (block // blocks_j) * BLOCK_I + tl.arange(0, BLOCK_I)
    j = (block % blocks_j) * BLOCK_J + tl.arange(0, BLOCK_J)
    start, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    sum = tl.zeros((BLOCK_I, BLOCK_J), dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        pair = first + tl.arange(0, BLOCK_R)
        real = pair < end
        token = tl.load(token_ptr + pair, mask=real, other=0)
        left_row = token if GATHER_LEFT else pair
        right_row = pair if GATHER_LEFT else token
        left_at = left_ptr + left_row[None, :] * stride_l + i[:, None]
        right_at = right_ptr + right_row[:, None] * stride_r + j[None, :]
        left = tl.load(left_at, mask=real[None, :] & (i < ROWS)[:, None], other=0.0)
        right = tl.load(right_at, mask=real[:, None] & (j < COLUMNS)[None, :], other=0.0)
        sum = multiply(left, right, sum, UPCAST, PRECISION)
    out_at = out_ptr + expert.to(tl.int64) * ROWS * COLUMNS + i[:, None] * COLUMNS + j[None, :]
    tl.store(out_at, sum.to(out_ptr.dtype.element_ty), mask=(i < ROWS)[:, None] & (j < COLUMNS)[None, :])
