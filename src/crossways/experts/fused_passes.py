"""The two passes of the C++ kernel, on plain tensors: `fused` makes operators and gradients of them.

Legend: T tokens, P pairs, E experts, D model width, F expert width, H rows of the first matrix (2F gated, F plain).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from crossways.experts.activation import Activation
from crossways.native import library
from crossways.native.memory import reused

_FUNCTIONS = {"swiglu": 0, "silu": 0, "geglu": 1, "gelu": 1, "reglu": 2, "relu": 2}


class _Problem(ctypes.Structure):
    """`Problem` of native/experts.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "experts", "width", "expert_width")),
        *((name, ctypes.c_int64) for name in ("gated", "function", "threads")),
        *((name, ctypes.c_void_p) for name in ("token", "offsets", "weight", "x", "up", "down", "kept", "y")),
        *((name, ctypes.c_void_p) for name in ("grad_y", "grad_x", "grad_up", "grad_down", "grad_weight")),
    )


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


def kept_shape(up_EHD: Tensor, token_P: Tensor, save: bool) -> tuple[int]:
    """Shape of what the first matrices return. Each expert's pairs are rounded up to a multiple of 32; the most that
    can take is known without looking at the loads, and what is never touched costs nothing."""
    experts, rows, _ = up_EHD.shape
    return ((token_P.shape[0] + 31 * experts) * rows if save else 0,)


def run_forward(
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
    kept = reused(kept_shape(up_EHD, token_P, save), x_TD.dtype)
    return run(x_TD, weight_P, up_EHD, down_EDF, token_P, offsets_E1, activation, kept if save else None), kept


def run(
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


def run_backward(
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
