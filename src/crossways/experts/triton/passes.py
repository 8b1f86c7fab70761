"""The way forward and the way back: the kernels in their order, and how long each intermediate tensor lives.

Legend: T tokens, P pairs, E experts, G tiles, D model width, F expert width, H rows of the first matrix.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from crossways.experts.triton.hidden_grad import hidden_grads
from crossways.experts.triton.launch import products_for
from crossways.experts.triton.layout import rows
from crossways.experts.triton.plan import TokenPairs, pairs_of_tokens, plan_tiles
from crossways.experts.triton.rows import row_products
from crossways.experts.triton.token_sum import token_sums
from crossways.experts.triton.up import up_products
from crossways.experts.triton.weight_grad import weight_grads


def forward_pass(
    x_TD: Tensor,
    weight_P: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    token_P: Tensor,
    offsets_E1: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output (T, D), then what backward needs: (P, H) before the activation, and the tokens' pairs."""
    num_pairs = token_P.numel()
    products = products_for(x_TD, num_pairs, up_EHD.shape[0], activation)
    with _device_of(x_TD):
        pairs = pairs_of_tokens(token_P, offsets_E1, x_TD.shape[0])
        if not num_pairs:  # nothing to launch, nor to time block shapes by
            return (
                torch.zeros_like(x_TD, memory_format=torch.contiguous_format),
                x_TD.new_empty(0, up_EHD.shape[1]),
                *pairs,
            )
        tiles = plan_tiles(offsets_E1, num_pairs, products.block_rows)
        hidden_PF, before_PH = up_products(
            rows(x_TD), token_P.contiguous(), weight_P.contiguous(), offsets_E1, up_EHD, tiles, products, save
        )
        y_PD = row_products(hidden_PF, offsets_E1, down_EDF.transpose(1, 2), tiles, products)
        del hidden_PF  # its memory serves the sums
        return token_sums(y_PD, pairs), before_PH, *pairs


def backward_pass(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_P: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    token_P: Tensor,
    offsets_E1: Tensor,
    before_PH: Tensor,
    pair_P: Tensor,
    start_T1: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, up and down; empty where not `wanted`.

    Raises:
        RuntimeError: when the way forward kept nothing for the way back.
    """
    num_pairs = token_P.numel()
    if before_PH.shape[0] != num_pairs:
        raise RuntimeError(
            f"{before_PH.shape[0]} of {num_pairs} pairs were kept for backward; run forward with `save`"
        )
    leaves = (x_TD, weight_P, up_EHD, down_EDF)
    if not num_pairs:
        x, weight, up, down = (
            leaf.new_zeros(leaf.shape if want else 0) for leaf, want in zip(leaves, wanted, strict=True)
        )
        return x, weight, up, down
    products = products_for(x_TD, num_pairs, up_EHD.shape[0], activation)
    grad_TD, token_P = rows(grad_TD), token_P.contiguous()
    segments = (token_P, offsets_E1, products)
    grad_x, grad_weight, grad_up, grad_down = (leaf.new_empty(0) for leaf in leaves)
    with _device_of(x_TD):
        # Planned again rather than kept: how many tiles there are must not be part of the operator's signature, since
        # it depends on sizes in a way that `torch.compile` cannot keep symbolic.
        tiles = plan_tiles(offsets_E1, num_pairs, products.block_rows)
        hidden_PF, grad_PH, part_P = hidden_grads(
            grad_TD, token_P, weight_P.contiguous(), offsets_E1, before_PH, down_EDF, tiles, products
        )
        if wanted[1]:
            grad_weight = part_P.to(weight_P.dtype)
        if wanted[3]:
            grad_down = weight_grads(grad_TD, hidden_PF, *segments, gathered="left")
        del hidden_PF  # its memory serves the next products
        if wanted[2]:
            grad_up = weight_grads(grad_PH, rows(x_TD), *segments, gathered="right")
        if wanted[0]:
            rows_PD = row_products(grad_PH, offsets_E1, up_EHD, tiles, products)
            del grad_PH  # its memory serves the sums
            grad_x = token_sums(rows_PD, TokenPairs(pair_P, start_T1))
    return grad_x, grad_weight, grad_up, grad_down


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
