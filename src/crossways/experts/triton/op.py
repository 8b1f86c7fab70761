"""The operators that PyTorch sees: opaque to `torch.compile`, so that a compiled layer has no graph break.

Legend: T tokens, P pairs, E experts, G tiles, D model width, F expert width, H rows of the first matrix.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.triton.hidden_grad import hidden_grads
from crossways.experts.triton.launch import products_for
from crossways.experts.triton.plan import TokenPairs, pairs_of_tokens, plan_tiles
from crossways.experts.triton.rows import row_products
from crossways.experts.triton.token_sum import token_sums
from crossways.experts.triton.up import up_products
from crossways.experts.triton.weight_grad import weight_grads


def experts(x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation) -> Tensor:
    """Same contract as `naive`; first derivatives only."""
    inputs = (x_TD, assignment.weight_P, up_EHD, down_EDF)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return forward(*inputs, assignment.token_P, assignment.offsets_E1, activation.name, save)[0]


@torch.library.custom_op("crossways::experts", mutates_args=())
def forward(
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
    products = products_for(x_TD, token_P.numel(), up_EHD.shape[0], activation)
    with _device_of(x_TD):
        tiles = plan_tiles(offsets_E1, token_P.numel(), products.block_rows)
        pairs = pairs_of_tokens(token_P, offsets_E1, x_TD.shape[0])
        hidden_PF, before_PH = up_products(x_TD, token_P, weight_P, offsets_E1, up_EHD, tiles, products, save)
        y_PD = row_products(hidden_PF, offsets_E1, down_EDF.transpose(1, 2), tiles, products)
        return token_sums(y_PD, pairs), before_PH, *pairs


@forward.register_fake
def _(
    x_TD: Tensor,
    weight_P: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    token_P: Tensor,
    offsets_E1: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = token_P.shape[0]
    return (
        x_TD.new_empty(x_TD.shape),
        x_TD.new_empty(pairs if save else 0, up_EHD.shape[1]),
        token_P.new_empty(pairs),
        token_P.new_empty(x_TD.shape[0] + 1),
    )


@torch.library.custom_op("crossways::experts_backward", mutates_args=())
def backward(
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
    """Gradients of x, weight, up and down; empty where not `wanted`."""
    products = products_for(x_TD, token_P.numel(), up_EHD.shape[0], activation)
    segments = (token_P, offsets_E1, products)
    grad_x, grad_weight, grad_up, grad_down = (x_TD.new_empty(0) for _ in range(4))
    with _device_of(x_TD):
        # Planned again rather than kept: how many tiles there are must not be part of the operator's signature, since
        # it depends on sizes in a way that `torch.compile` cannot keep symbolic.
        tiles = plan_tiles(offsets_E1, token_P.numel(), products.block_rows)
        hidden_PF, grad_PH, part_P = hidden_grads(
            grad_TD, token_P, weight_P, offsets_E1, before_PH, down_EDF, tiles, products
        )
        if wanted[1]:
            grad_weight = part_P.to(weight_P.dtype)
        if wanted[3]:
            grad_down = weight_grads(grad_TD, hidden_PF, *segments, gathered="left")
        del hidden_PF  # its memory serves the next products
        if wanted[2]:
            grad_up = weight_grads(grad_PH, x_TD, *segments, gathered="right")
        if wanted[0]:
            rows_PD = row_products(grad_PH, offsets_E1, up_EHD, tiles, products)
            grad_x = token_sums(rows_PD, TokenPairs(pair_P, start_T1))
    return grad_x, grad_weight, grad_up, grad_down


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@backward.register_fake
def _(
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
    leaves = (x_TD, weight_P, up_EHD, down_EDF)
    x, weight, up, down = (
        leaf.new_empty(leaf.shape if want else (0,)) for leaf, want in zip(leaves, wanted, strict=True)
    )
    return x, weight, up, down


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, activation, _ = inputs
    _, *planned = output
    ctx.save_for_backward(*tensors, *planned)
    ctx.activation = activation


def _differentiate(ctx: Any, grad_TD: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:4])
    grads = backward(grad_TD, *ctx.saved_tensors, ctx.activation, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)
