"""Back through the second matrix, the routing weight and the activation, in one pass over the pairs.

With h = activation(before) and g the gradient of y at the pair's token: the gradient of weight * h is down_e^T g;
from it come the gradients of the weight and of `before`, and weight * h itself, which the second matrix' gradient
needs.

Legend: T tokens, P pairs, E experts, N column tiles, D model width, F expert width, H columns before the activation.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from crossways.experts.triton.activations import activate, derivative
from crossways.experts.triton.configs import MIN_BLOCK_N, prune_row_products, row_product_configs
from crossways.experts.triton.launch import Products
from crossways.experts.triton.layout import matrices
from crossways.experts.triton.plan import Tiles
from crossways.experts.triton.tiling import multiple, part_of_program, product
from crossways.experts.triton.timing import milliseconds


class HiddenGrads(NamedTuple):
    """What `hidden_grads` gives. Slack rows of the first two are left as they were allocated."""

    hidden_PF: Tensor
    """weight * h."""
    before_PH: Tensor
    """Gradient of what the activation was applied to."""
    weight_P: Tensor
    """Gradient of the routing weights, float32; zero for slack."""


def hidden_grads(
    grad_TD: Tensor,
    token_P: Tensor,
    weight_P: Tensor,
    offsets_E1: Tensor,
    before_PH: Tensor,
    down_EDF: Tensor,
    tiles: Tiles,
    products: Products,
) -> HiddenGrads:
    """From the gradient of the output (T, D)."""
    pairs, matrix, count = token_P.numel(), matrices(down_EDF), tiles.expert_G.numel()
    hidden_PF, grad_PH = before_PH.new_empty(pairs, matrix.N), before_PH.new_empty(before_PH.shape)
    part_NP = weight_P.new_zeros(triton.cdiv(matrix.N, MIN_BLOCK_N), pairs, dtype=torch.float32)
    hidden_grad_kernel[lambda meta: (count * triton.cdiv(matrix.N, meta["BLOCK_N"]),)](
        *(grad_TD, token_P, weight_P, matrix.tensor, before_PH, hidden_PF, grad_PH, part_NP),
        *(tiles.expert_G, tiles.row_G, offsets_E1),
        *(grad_TD.stride(0), matrix.stride_e, matrix.stride, count, pairs, matrix.K, matrix.N),
        ACTIVATION=products.activation,
        GATED=products.gated,
        K_INNER=matrix.k_inner,
        ALIGN=gcd(matrix.align, grad_TD.stride(0)),
        **products.meta(),
    )
    return HiddenGrads(hidden_PF, grad_PH, part_NP.sum(0))


@triton.autotune(
    row_product_configs(),
    key=["D", "F", "BLOCK_M", "GATED"],
    prune_configs_by={"early_config_prune": prune_row_products("F", held=2, in_pieces=True)},
    do_bench=milliseconds,
    # While timing, candidates with narrow tiles write parts that the chosen one may not overwrite.
    reset_to_zero=["part_ptr"],
)
@triton.jit
def hidden_grad_kernel(
    grad_ptr,
    token_ptr,
    weight_ptr,
    down_ptr,
    before_ptr,
    hidden_ptr,
    grad_before_ptr,
    part_ptr,
    tile_expert_ptr,
    tile_row_ptr,
    offsets_ptr,
    stride_g,
    stride_e,
    stride,
    tiles,
    P,
    D,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    K_INNER: tl.constexpr,
    ALIGN: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One tile of rows by `BLOCK_N` hidden units."""
    stride_g, stride_e, stride = multiple(stride_g, ALIGN), multiple(stride_e, ALIGN), multiple(stride, ALIGN)
    D, F = multiple(D, ALIGN), multiple(F, ALIGN)
    expert, first, row, real, tile_n = part_of_program(
        tile_expert_ptr, tile_row_ptr, offsets_ptr, tiles, F, BLOCK_M, BLOCK_N, GROUP_M
    )
    if expert < 0:
        return
    token = tl.load(token_ptr + first + row, mask=real, other=0)
    f = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    grad_at = grad_ptr + token[:, None] * stride_g + tl.arange(0, BLOCK_K)[None, :]
    down = down_ptr + expert.to(tl.int64) * stride_e
    grad = product(grad_at, down, stride, f, real, D, F, K_INNER, UPCAST, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K)
    weight = tl.load(weight_ptr + first + row, mask=real, other=0.0).to(tl.float32)[:, None]
    H: tl.constexpr = 2 if GATED else 1
    PIECE_N: tl.constexpr = 16 if BLOCK_N > 128 else BLOCK_N // 2  # a wide tile leaves few registers
    before_at, grad_before_at, hidden_at = (
        before_ptr + first * F * H,
        grad_before_ptr + first * F * H,
        hidden_ptr + first * F,
    )
    part = back_through_pieces(
        grad, weight, before_at, grad_before_at, hidden_at, row, tile_n * BLOCK_N, real, F, ACTIVATION, GATED, PIECE_N
    )  # fmt: skip
    tl.store(part_ptr + tile_n.to(tl.int64) * P + first + row, part, mask=real)


@triton.jit
def back_through_pieces(
    grad,
    weight,
    before_ptr,
    grad_before_ptr,
    hidden_ptr,
    row,
    first_f,
    real,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PIECE_N: tl.constexpr,
):
    """As `back_through_activation`, at most `PIECE_N` columns at a time: the whole tile's operands would not fit the
    registers."""
    M: tl.constexpr = grad.shape[0]
    N: tl.constexpr = grad.shape[1]
    if N <= PIECE_N:
        f = first_f + tl.arange(0, N)
        part = back_through_activation(
            grad, weight, before_ptr, grad_before_ptr, hidden_ptr, row, f, real, F, ACTIVATION, GATED
        )
    else:
        low, high = tl.split(tl.permute(tl.reshape(grad, (M, 2, N // 2)), (0, 2, 1)))
        part = back_through_pieces(
            low, weight, before_ptr, grad_before_ptr, hidden_ptr, row, first_f, real, F, ACTIVATION, GATED, PIECE_N
        )
        first_f += N // 2
        part += back_through_pieces(
            high, weight, before_ptr, grad_before_ptr, hidden_ptr, row, first_f, real, F, ACTIVATION, GATED, PIECE_N
        )
    return part


@triton.jit
def back_through_activation(
    grad,
    weight,
    before_ptr,
    grad_before_ptr,
    hidden_ptr,
    row,
    f,
    real,
    F,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
):
    """Store weighted hidden units and the gradient before the activation; returns the sum of grad * hidden.

    Offsets within the tile have 32 bits: 64-bit ones take too many registers.
    """
    stored = real[:, None] & (f < F)[None, :]
    dtype = hidden_ptr.dtype.element_ty
    H: tl.constexpr = 2 if GATED else 1
    at_H = row[:, None] * (F * H) + f[None, :]
    gate = tl.load(before_ptr + at_H, mask=stored, other=0.0).to(tl.float32)
    hidden = activate(gate, ACTIVATION)
    slope = grad * weight * derivative(gate, ACTIVATION)
    if GATED:
        value = tl.load(before_ptr + F + at_H, mask=stored, other=0.0).to(tl.float32)
        tl.store(grad_before_ptr + F + at_H, (grad * weight * hidden).to(dtype), mask=stored)
        slope = slope * value
        hidden = hidden * value
    tl.store(grad_before_ptr + at_H, slope.to(dtype), mask=stored)
    tl.store(hidden_ptr + row[:, None] * F + f[None, :], (hidden * weight).to(dtype), mask=stored)
    return tl.sum(grad * hidden, 1)
