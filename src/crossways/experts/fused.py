"""The `fused` backend: C++ that takes a group of tokens all the way through an expert while both are in the cache.

It is compiled on first use (`crossways.native`); see `native/experts.cpp` for what it does and why it is fast.

Legend: T tokens, P pairs, E experts, D model width, F expert width, H rows of the first matrix (2F gated, F plain).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.native import library, why_not_native

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
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {dtype}"
    if reason := why_not_native():
        return reason
    if dtype == torch.bfloat16 and not library().crossways_matrix_unit():
        return "in bfloat16 it needs a processor (and a compiler that knows it) with AMX"
    return None


def fused(x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation) -> Tensor:
    """Same contract as `naive`; first derivatives only.

    Raises:
        ValueError: for an assignment that names tokens that do not exist.
    """
    inputs = (x_TD, assignment.weight_P, up_EHD, down_EDF)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _Fused.apply(*inputs, assignment.token_P, assignment.offsets_E1, activation, save)


def _problem(tensors: dict[str, Tensor | None], activation: Activation) -> _Problem:
    """The structure, of tensors that must stay alive while it is used."""
    x_TD, down_EDF = tensors["x"], tensors["down"]
    assert x_TD is not None
    assert down_EDF is not None
    return _Problem(
        tokens=x_TD.shape[0],
        experts=down_EDF.shape[0],
        width=x_TD.shape[1],
        expert_width=down_EDF.shape[2],
        gated=activation.gated,
        function=_FUNCTIONS[activation.name],
        threads=torch.get_num_threads(),
        **{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None},
    )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_P: Tensor,
        up_EHD: Tensor,
        down_EDF: Tensor,
        token_P: Tensor,
        offsets_E1: Tensor,
        activation: Activation,
        save: bool,
    ) -> Tensor:
        tensors: dict[str, Tensor | None] = {
            "x": x_TD.contiguous(),
            "up": up_EHD.contiguous(),
            "down": down_EDF.contiguous(),
            "weight": weight_P.float().contiguous(),
            "token": token_P.to(torch.int64).contiguous(),
            "offsets": offsets_E1.to(torch.int64).contiguous(),
        }
        ctx.activation, ctx.names, ctx.weight_dtype = activation, tuple(tensors), weight_P.dtype
        y_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype)
        problem = _problem({**tensors, "y": y_TD}, activation)
        native = library()
        if not native.crossways_valid(ctypes.byref(problem), ctypes.c_int64(len(token_P))):
            raise ValueError(
                f"the assignment does not fit: a token outside [0, {len(x_TD)}), or offsets that are not its pairs'; "
                "build it with Assignment.from_pairs, from_topk or from_mask"
            )
        kept = None
        if save:
            native.crossways_kept_size.restype = ctypes.c_int64
            kept = torch.empty(native.crossways_kept_size(ctypes.byref(problem)), dtype=x_TD.dtype)
            problem.kept = kept.data_ptr()
        _call(native.crossways_experts_forward, problem, x_TD.dtype)
        ctx.save_for_backward(*tensors.values(), kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *saved, kept = ctx.saved_tensors
        tensors = dict(zip(ctx.names, saved, strict=True))
        wanted = dict(zip(("x", "weight", "up", "down"), ctx.needs_input_grad, strict=False))
        out = {name: torch.empty_like(tensors[name]) if want else None for name, want in wanted.items()}
        pointers = {**tensors, "kept": kept, "grad_y": grads[0].to(kept.dtype).contiguous()}
        pointers |= {f"grad_{name}": tensor for name, tensor in out.items()}
        _call(library().crossways_experts_backward, _problem(pointers, ctx.activation), kept.dtype)
        if out["weight"] is not None:
            out["weight"] = out["weight"].to(ctx.weight_dtype)
        return (*out.values(), None, None, None, None)


def _call(function: Any, problem: _Problem, dtype: torch.dtype) -> None:
    function(ctypes.byref(problem), int(dtype == torch.bfloat16))
