"""hidden[p] = weight[p] * activation(up_e x[token[p]]): gather, product, activation and weight in one pass.

Legend: T tokens, P pairs, E experts, D model width, F expert width, H rows of the first matrix (2F gated, F plain).
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from crossways.experts.triton.activations import activate
from crossways.experts.triton.configs import prune_row_products, row_product_configs
from crossways.experts.triton.launch import Products
from crossways.experts.triton.layout import matrices
from crossways.experts.triton.plan import Tiles
from crossways.experts.triton.tiling import element, multiple, multiply, part_of_program
from crossways.experts.triton.timing import milliseconds


def up_products(
    x_TD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    up_EHD: Tensor,
    tiles: Tiles,
    products: Products,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The weighted hidden rows (P, F) and, where `save`, what the activation was applied to (P, H), else (0, H)."""
    pairs, matrix, count = token_P.numel(), matrices(up_EHD.transpose(1, 2)), tiles.expert_G.numel()
    width = matrix.N // 2 if products.gated else matrix.N
    hidden_PF = x_TD.new_empty(pairs, width)
    before_PH = x_TD.new_empty(pairs if save else 0, matrix.N)
    up_kernel[lambda meta: (count * triton.cdiv(width, meta["BLOCK_N"]),)](
        *(x_TD, token_P, weight_P, matrix.tensor, hidden_PF, before_PH, tiles.expert_G, tiles.row_G, offsets_E1),
        *(x_TD.stride(0), matrix.stride_e, matrix.stride, count, matrix.K, width),
        ACTIVATION=products.activation,
        GATED=products.gated,
        SAVE=save,
        K_INNER=matrix.k_inner,
        ALIGN=gcd(matrix.align, x_TD.stride(0), width),
        **products.meta(),
    )
    return hidden_PF, before_PH


@triton.autotune(
    row_product_configs(),
    key=["D", "F", "BLOCK_M", "GATED"],
    prune_configs_by={"early_config_prune": prune_row_products("F", held=2, twice_if_gated=True)},
    do_bench=milliseconds,
)
@triton.jit
def up_kernel(
    x_ptr,
    token_ptr,
    weight_ptr,
    up_ptr,
    hidden_ptr,
    before_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    offsets_ptr,
    stride_x,
    stride_e,
    stride,
    tiles,
    D,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    SAVE: tl.constexpr,
    K_INNER: tl.constexpr,
    ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows by `BLOCK_N` hidden units; gated activations keep two accumulators."""
    stride_x, stride_e, stride = multiple(stride_x, ALIGN), multiple(stride_e, ALIGN), multiple(stride, ALIGN)
    D, F = multiple(D, ALIGN), multiple(F, ALIGN)
    expert, first, row, real, tile_n = part_of_program(
        tile_expert_ptr, tile_row_ptr, offsets_ptr, tiles, F, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    token = tl.load(token_ptr + first + row, mask=real, other=0)
    f = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * stride_x + d[None, :]
    up_at = element(up_ptr + expert.to(tl.int64) * stride_e, stride, d[:, None], f[None, :], K_INNER)
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    value = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, D, BLOCK_K):
        inside = d < D - done
        x = tl.load(x_at, mask=real[:, None] & inside[None, :], other=0.0)
        wanted = inside[:, None] & (f < F)[None, :]
        gate = multiply(x, tl.load(up_at, mask=wanted, other=0.0), gate, UPCAST, PRECISION)
        if GATED:
            up = tl.load(element(up_at, stride, 0, F, K_INNER), mask=wanted, other=0.0)
            value = multiply(x, up, value, UPCAST, PRECISION)
        x_at += BLOCK_K
        up_at = element(up_at, stride, BLOCK_K, 0, K_INNER)
    stored = real[:, None] & (f < F)[None, :]
    dtype = hidden_ptr.dtype.element_ty
    hidden = activate(gate, ACTIVATION)
    if SAVE:
        H: tl.constexpr = 2 if GATED else 1
        # A scalar base and 32-bit offsets within the tile: 64-bit ones take too many registers.
        before_at = before_ptr + first * F * H + row[:, None] * (F * H) + f[None, :]
        tl.store(before_at, gate.to(dtype), mask=stored)
        if GATED:
            tl.store(before_at + F, value.to(dtype), mask=stored)
    if GATED:
        hidden = hidden * value
    weight = tl.load(weight_ptr + first + row, mask=real, other=0.0).to(tl.float32)
    hidden_at = hidden_ptr + first * F + row[:, None] * F + f[None, :]
    tl.store(hidden_at, (hidden * weight[:, None]).to(dtype), mask=stored)
