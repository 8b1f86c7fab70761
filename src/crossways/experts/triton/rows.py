"""out[p] = matrix_e rows[p]: the second matrix on the way forward, the first one's transpose on the way back.

Legend: P pairs, E experts, G tiles, K columns of the input, N columns of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crossways.experts.triton.configs import prune_row_products, row_product_configs
from crossways.experts.triton.launch import Products
from crossways.experts.triton.layout import matrices
from crossways.experts.triton.plan import Tiles
from crossways.experts.triton.tiling import multiple, part_of_program, product
from crossways.experts.triton.timing import milliseconds


def row_products(rows_PK: Tensor, offsets_E1: Tensor, matrix_EKN: Tensor, tiles: Tiles, products: Products) -> Tensor:
    """Each pair's row times its expert's matrix: (P, N). Slack rows are left as they were allocated.

    Args:
        rows_PK: contiguous.
        offsets_E1: first pair of each expert, and the end of the last.
        matrix_EKN: of any strides; pass a transposed view for a transposed product.
        tiles: from `plan_tiles`.
        products: from `products_for`.
    """
    matrix, count = matrices(matrix_EKN), tiles.expert_G.numel()
    out_PN = rows_PK.new_empty(rows_PK.shape[0], matrix.N)
    row_kernel[lambda meta: (count * triton.cdiv(matrix.N, meta["BLOCK_N"]),)](
        *(rows_PK, matrix.tensor, out_PN, tiles.expert_G, tiles.row_G, offsets_E1),
        *(matrix.stride_e, matrix.stride, count, matrix.K, matrix.N),
        K_INNER=matrix.k_inner,
        ALIGN=matrix.align,
        **products.meta(),
    )
    return out_PN


@triton.autotune(
    row_product_configs(),
    key=["K", "N", "BLOCK_M", "K_INNER"],
    prune_configs_by={"early_config_prune": prune_row_products("N")},
    do_bench=milliseconds,
)
@triton.jit
def row_kernel(
    rows_ptr,
    matrix_ptr,
    out_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    offsets_ptr,
    stride_e,
    stride,
    tiles,
    K,
    N,
    K_INNER: tl.constexpr,
    ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows by `BLOCK_N` columns; `ALIGN` divides all sizes and strides."""
    stride_e, stride = multiple(stride_e, ALIGN), multiple(stride, ALIGN)
    K, N = multiple(K, ALIGN), multiple(N, ALIGN)
    expert, first, row, real, tile_n = part_of_program(
        tile_expert_ptr, tile_row_ptr, offsets_ptr, tiles, N, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_at = rows_ptr + first * K + row[:, None] * K + tl.arange(0, BLOCK_K)[None, :]
    matrix = matrix_ptr + expert.to(tl.int64) * stride_e
    sum = product(
        rows_at, matrix, stride, n, real, K, N, K_INNER, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    out_at = out_ptr + first * N + row[:, None] * N + n[None, :]
    tl.store(out_at, sum.to(out_ptr.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])
