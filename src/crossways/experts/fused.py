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
from crossways.native import library, why_not_native
from crossways.native.memory import reused
from crossways.native.watched import has_tangent, is_watched

_FUNCTIONS = {"swiglu": 0, "silu": 0, "geglu": 1, "gelu": 1, "reglu": 2, "relu": 2}


class _Problem(ctypes.Structure):
    """`Problem` of native/experts.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "width", "expert_width")),
        *((name, ctypes.c_int64) for name in ("gated", "function", "threads")),
        *((name, ctypes.c_void_p) for name in ("token", "offsets", "weight", "x", "up", "down", "kept", "y")),
        *((name, ctypes.c_void_p) for name in ("grad_y", "grad_x", "grad_up", "grad_down", "grad_weight")),
    )


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
    return _Unwatched.apply(*arguments, save) if save else _run(*arguments, None)


def _tensors(
    x_TD: Tensor, weight_P: Tensor, up_EHD: Tensor, down_EDF: Tensor, token_P: Tensor, offsets_E1: Tensor
) -> dict[str, Tensor]:
    """As the C++ reads them. They must stay alive while it does."""
    return {
        "x": x_TD.contiguous(),
        "weight": weight_P.float().contiguous(),
        "up": up_EHD.contiguous(),
        "down": down_EDF.contiguous(),
        "token": token_P.to(torch.int64).contiguous(),
        "offsets": offsets_E1.to(torch.int64).contiguous(),
    }


def _problem(tensors: dict[str, Tensor], activation: str) -> _Problem:
    tokens, width = tensors["x"].shape
    experts, _, expert_width = tensors["down"].shape
    return _Problem(
        tokens=tokens,
        experts=experts,
        width=width,
        expert_width=expert_width,
        gated=Activation(activation).gated,
        function=_FUNCTIONS[activation],
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items()},
    )


def _kept(up_EHD: Tensor, token_P: Tensor, save: bool) -> tuple[int]:
    """Shape of what the first matrices return. Each expert's pairs are rounded up to a multiple of 32; the most that
    can take is known without looking at the loads, and what is never touched costs nothing."""
    experts, rows, _ = up_EHD.shape
    return ((token_P.shape[0] + 31 * experts) * rows if save else 0,)


def _forward(
    x_TD: Tensor,
    weight_P: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    token_P: Tensor,
    offsets_E1: Tensor,
    activation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The output (T, D), and what backward needs."""
    kept = reused(_kept(up_EHD, token_P, save), x_TD.dtype)
    return _run(x_TD, weight_P, up_EHD, down_EDF, token_P, offsets_E1, activation, kept if save else None), kept


def _run(
    x_TD: Tensor,
    weight_P: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    token_P: Tensor,
    offsets_E1: Tensor,
    activation: str,
    kept: Tensor | None,
) -> Tensor:
    """The output (T, D); fills `kept`. In as few operations as can be: in a step of generation they take as long as
    the kernel."""
    if weight_P.dtype is not torch.float32 and weight_P.dtype is not torch.bfloat16:
        weight_P = weight_P.float()
    # Named, so that they live until the call is over.
    x_TD, up_EHD, down_EDF = x_TD.contiguous(), up_EHD.contiguous(), down_EDF.contiguous()
    weight_P, token_P, offsets_E1 = weight_P.contiguous(), _indices(token_P), _indices(offsets_E1)
    (tokens, width), (experts, rows, _), expert_width = x_TD.shape, up_EHD.shape, down_EDF.shape[2]
    y_TD = torch.empty(tokens, width, dtype=x_TD.dtype)
    if not _pass(library())(
        x_TD.data_ptr(), up_EHD.data_ptr(), down_EDF.data_ptr(), weight_P.data_ptr(), token_P.data_ptr(),
        offsets_E1.data_ptr(), None if kept is None else kept.data_ptr(), y_TD.data_ptr(), tokens, experts,
        token_P.shape[0], width, expert_width, rows > expert_width, _FUNCTIONS[activation],
        x_TD.dtype is torch.bfloat16, weight_P.dtype is torch.bfloat16, torch.get_num_threads(),
    ):  # fmt: skip
        raise ValueError(
            f"the assignment does not fit: a token outside [0, {tokens}), or offsets that are not its pairs'; "
            "build it with Assignment.from_pairs, from_topk or from_mask"
        )
    return y_TD


def _indices(index: Tensor) -> Tensor:
    return index.contiguous() if index.dtype is torch.int64 else index.to(torch.int64).contiguous()


@cache
def _pass(parts: ctypes.CDLL) -> Callable[..., int]:
    """`crossways_experts_pass` with its types, so that numbers go there as they are."""
    types = (*(ctypes.c_void_p,) * 8, *(ctypes.c_int64,) * 10)
    run: Callable[..., int] = ctypes.CFUNCTYPE(ctypes.c_int, *types)(("crossways_experts_pass", parts))
    return run


forward = torch.library.custom_op("crossways::fused_experts", _forward, mutates_args=(), device_types="cpu")


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
    return x_TD.new_empty(x_TD.shape), x_TD.new_empty(_kept(up_EHD, token_P, save))


def _backward(
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
    """Gradients of x, weight, up and down; empty where not `wanted`."""
    tensors = _tensors(x_TD, weight_P, up_EHD, down_EDF, token_P, offsets_E1)
    tensors |= {"kept": kept, "grad_y": grad_TD.to(x_TD.dtype).contiguous()}
    grads = {
        name: reused(tensors[name].shape if want else (0,), tensors[name].dtype)
        for name, want in zip(("x", "weight", "up", "down"), wanted, strict=True)
    }
    out = {f"grad_{name}": grads[name] for name, want in zip(grads, wanted, strict=True) if want}
    if wanted[1]:
        grads["weight"].zero_()  # slack belongs to nobody
    problem = _problem(tensors | out, activation)
    library().crossways_experts_backward(ctypes.byref(problem), int(x_TD.dtype == torch.bfloat16))
    return grads["x"], grads["weight"].to(weight_P.dtype), grads["up"], grads["down"]


backward = torch.library.custom_op(
    "crossways::fused_experts_backward", _backward, mutates_args=(), device_types="cpu"
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
        output = _forward(*arguments)
        _keep(ctx, arguments, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, grad_TD, _backward)
