"""The `fused` backend: C++ that takes a group of tokens all the way through an expert while both are in the cache.

It is compiled on first use (`crossways.native`); `native/experts.cpp` says what it does and why it is fast, and
`native/few.cpp` what is done for the few tokens of a step of generation. Here are
the operators that PyTorch sees: opaque to `torch.compile`, so that a compiled layer has no graph break.

Legend: T tokens, P pairs, E experts, D model width, F expert width, H rows of the first matrix (2F gated, F plain).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.fused_passes import kept_shape, run, run_backward, run_forward
from crossways.native import library, why_not_native
from crossways.native.watched import has_tangent, is_watched


def why_not_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot run on tensors of this device and dtype, or None. May compile the C++ parts."""
    if device.type != "cpu":
        return f"it is for CPU tensors, and these are on {device.type}"
    return why_not_fused_here(dtype)


def why_not_fused_here(dtype: torch.dtype) -> str | None:
    """The same for CPU tensors."""
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    return why_not_native() or _why_not_with(library(), dtype)


@cache
def _why_not_with(parts: ctypes.CDLL, dtype: torch.dtype) -> str | None:
    if dtype == torch.bfloat16 and not parts.crossways_matrix_unit():
        return "in bfloat16 it needs a processor (and a compiler that knows it) with AMX"
    return None


def fused(x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation) -> Tensor:
    """Same contract as `naive`; first derivatives only. Takes assignments with slack.

    Raises:
        ValueError: for an assignment that names tokens that do not exist.
        NotImplementedError: when somebody wants forward-mode derivatives, which would be lost.
    """
    inputs = (x_TD, assignment.weight_P, up_EHD, down_EDF)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    arguments = (*inputs, assignment.token_P, assignment.offsets_E1, activation.name)
    if is_watched(*inputs):
        if has_tangent(*inputs):
            raise NotImplementedError("`fused` has no forward-mode derivatives; choose the experts backend naive")
        return forward(*arguments, save)[0]
    return _Unwatched.apply(*arguments, save) if save else run(*arguments, None)


forward = torch.library.custom_op("crossways::fused_experts", run_forward, mutates_args=(), device_types="cpu")


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
) -> tuple[Tensor, Tensor]:
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(kept_shape(up_EHD, token_P, save))


backward = torch.library.custom_op(
    "crossways::fused_experts_backward", run_backward, mutates_args=(), device_types="cpu"
)


@backward.register_fake
def _(
    grad_TD: Tensor,
    x_TD: Tensor,
    weight_P: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    token_P: Tensor,
    offsets_E1: Tensor,
    kept: Tensor,
    activation: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight, up, down = (
        leaf.new_empty(leaf.shape if want else (0,))
        for leaf, want in zip((x_TD, weight_P, up_EHD, down_EDF), wanted, strict=True)
    )
    return x, weight, up, down


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, activation, _ = inputs
    ctx.set_materialize_grads(False)  # a gradient of `kept` would be written for nothing, as large as `kept`
    ctx.save_for_backward(*tensors, output[1])
    ctx.activation = activation


def _differentiate(ctx: Any, grad_TD: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, grad_TD, backward)


def _gradients(
    ctx: Any, grad_TD: Tensor | None, compute: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:4])
    grads = compute(grad_TD, *ctx.saved_tensors, ctx.activation, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)


class _Unwatched(torch.autograd.Function):
    """The same without the operators, which nobody watches: going through them takes longer than small layers do."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        output = run_forward(*arguments)
        _keep(ctx, arguments, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_TD, run_backward)
