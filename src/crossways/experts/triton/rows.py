"""out[p] = matrix_e rows[p]: the second matrix on the way forward, the first one's transpose on the way back.

Legend: P pairs, E experts, G tiles, K columns of the input, N columns of the output.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crossways.experts.triton.configs import prune_row_products, row_product_configs
from crossways.experts.triton.launch import Products
from crossways.experts.triton.plan import Tiles
from crossways.experts.triton.tiling import multiply, rows_of_tile, tile_of_program


def row_products(rows_PK: Tensor, offsets_E1: Tensor, matrix_EKN: Tensor, tiles: Tiles, products: Products) -> Tensor:
    """Each pair's row times its expert's matrix: (P, N). Slack rows are left as they were allocated.

    Args:
        rows_PK: contiguous.
        offsets_E1: first pair of each expert, and the end of the last.
        matrix_EKN: of any strides; pass a transposed view for a transposed product.
        tiles: from `plan_tiles`.
        products: from `products_for`.
    """
    out_PN = rows_PK.new_empty(rows_PK.shape[0], matrix_EKN.shape[2])
    count = tiles.expert_G.numel()
    row_kernel[lambda meta: (count * triton.cdiv(out_PN.shape[1], meta["BLOCK_N"]),)](
        *(rows_PK, matrix_EKN, out_PN, tiles.expert_G, tiles.row_G, offsets_E1),
        *(*matrix_EKN.stride(), count, *matrix_EKN.shape[1:]),
        **products.meta(),
    )
    return out_PN


@triton.autotune(
    row_product_configs(),
    key=["K", "N", "BLOCK_M", "stride_mk"],
    prune_configs_by={"early_config_prune": prune_row_products("N", gated=False)},
)
@triton.jit
def row_kernel(
    rows_ptr,
    matrix_ptr,
    out_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    offsets_ptr,
    stride_me,
    stride_mk,
    stride_mn,
    tiles,
    K,
    N,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows by `BLOCK_N` columns."""
    tile, tile_n = tile_of_program(tiles, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, first, left = rows_of_tile(tile, tile_expert_ptr, tile_row_ptr, offsets_ptr)
    if expert < 0:
        return
    row = tl.arange(0, BLOCK_M)
    real = row < left
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    rows_at = rows_ptr + first * K + row[:, None] * K + k[None, :]
    matrix_at = matrix_ptr + expert.to(tl.int64) * stride_me + k[:, None] * stride_mk + n[None, :] * stride_mn
    sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        inside = k < K - done
        a = tl.load(rows_at, mask=real[:, None] & inside[None, :], other=0.0)
        b = tl.load(matrix_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        sum = multiply(a, b, sum, UPCAST, PRECISION)
        rows_at += BLOCK_K
        matrix_at += BLOCK_K * stride_mk
    out = sum.to(out_ptr.dtype.element_ty)
    out_at = out_ptr + first * N + row[:, None] * N + n[None, :]
    tl.store(out_at, out, mask=real[:, None] & (n < N)[None, :])
