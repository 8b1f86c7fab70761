"""Expert compute behind one function, and the choice of the backend that does it.

Legend: T tokens, E experts, D model width, F expert width, H rows of the first matrix (2F gated, F plain).
"""

from __future__ import annotations

import warnings
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.experts.activation import Activation
from crossways.experts.biased import Biases, with_biases
from crossways.experts.fused import fused, why_not_fused, why_not_fused_here
from crossways.experts.grouped import grouped
from crossways.experts.loop import loop
from crossways.experts.naive import naive
from crossways.experts.peers import PREFIX, peer_names, run_peer, why_not_peer
from crossways.experts.triton import triton_experts, why_not_triton

_OURS = {"naive": naive, "fused": fused, "loop": loop, "grouped_mm": grouped, "triton": triton_experts}
_TAKE_SLACK = ("fused", "triton", "grouped_mm")
"""Who can work without knowing the number of pairs on the host."""


def backends() -> list[str]:
    """Every backend name, whether or not it can run here: ours, then transformers' own."""
    return [*_OURS, *peer_names()]


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend `name` cannot run on tensors of this device and dtype; None when it can.

    Raises:
        UserError: for an unknown name.
    """
    if name not in backends():
        raise UserError(f"unknown experts backend {name!r}; choose auto or one of {', '.join(backends())}")
    if name == "loop" and device.type != "cpu":
        return f"it reads the expert loads on the host, so it is for CPU tensors, and these are on {device.type}"
    if name == "fused":
        return why_not_fused(device, dtype)
    if name == "grouped_mm":
        return _why_not_grouped(device, dtype)
    if name == "triton":
        return why_not_triton(device, dtype)
    return why_not_peer(name, device, dtype) if name.startswith(PREFIX) else None


def _why_not_grouped(device: torch.device, dtype: torch.dtype) -> str | None:
    if not hasattr(functional, "grouped_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"torch.nn.functional.grouped_mm does not take {dtype}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "torch.nn.functional.grouped_mm needs compute capability 8.0"
    return None


@torch.compiler.assume_constant_result
def resolve_backend(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend that `name` means for tensors of this device and dtype.

    `auto` is the first that runs of `fused` and `loop` on a CPU, and of `triton`, `grouped_mm` and `naive` elsewhere,
    with a warning that says why those before it do not. Any other name means itself: a backend that was asked for by
    name is never replaced.

    Raises:
        UserError: for an unknown name, or a backend that cannot run; the message says why.
    """
    if device == "cpu" and name in ("auto", "fused") and why_not_fused_here(dtype) is None:
        return "fused"  # what follows comes to the same, but in a step of generation it takes longer than routing
    device = torch.device(device)
    if name == "auto":
        return _first_that_runs(device, dtype)
    if reason := why_not(name, device, dtype):
        raise UserError(f"experts backend {name!r} cannot run: {reason}; choose another, or auto")
    return name


def _first_that_runs(device: torch.device, dtype: torch.dtype) -> str:
    """By the order of speed; `naive` runs anywhere."""
    for name in ("fused", "loop") if device.type == "cpu" else ("triton", "grouped_mm"):
        reason = why_not(name, device, dtype)
        if reason is None:
            return name
        warnings.warn(f"experts backend {name!r} cannot run: {reason}; trying the next", stacklevel=3)
    return "naive"


def compute_experts(
    x_TD: Tensor,
    assignment: Assignment,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: Activation,
    backend: str = "auto",
    biases: Biases | None = None,
) -> Tensor:
    """y[t] = sum over t's pairs of weight * down_e(activation(up_e(x[t]))).

    Under `torch.autocast` the products run in the autocast dtype.

    Args:
        x_TD: inputs (T, D), of any floating dtype and strides.
        assignment: which experts each token visits; routing weights of any floating dtype.
        up_EHD: first matrices, (E, 2F, D) for gated activations (gate rows first), else (E, F, D); dtype of `x_TD`.
        down_EDF: second matrices (E, D, F).
        activation: between the two.
        backend: a name from `backends()`, or `auto`.
        biases: what up_e and down_e add, of the dtype of the matrices; None for nothing.

    Returns:
        (T, D) in the dtype of `x_TD`; zero rows for tokens that chose nobody.

    Raises:
        UserError: when the backend cannot run.
        ValueError: when shapes or dtypes do not fit each other.
    """
    _check_shapes(x_TD, assignment, up_EHD, down_EDF, activation)
    if biases is not None:
        _check_biases(biases, up_EHD, down_EDF)
    dtype = x_TD.dtype
    if torch._C._is_any_autocast_enabled() and _autocasts(x_TD):
        device = x_TD.device.type
        low = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            tensors = x_TD.to(low), assignment, up_EHD.to(low), down_EDF.to(low)
            low_biases = None if biases is None else Biases(biases.up_EH.to(low), biases.down_ED.to(low))
            return compute_experts(*tensors, activation, backend, low_biases).to(dtype)
    if up_EHD.dtype != dtype or down_EDF.dtype != dtype:
        raise ValueError(
            f"inputs are {dtype} but expert weights {up_EHD.dtype} and {down_EDF.dtype}; convert one, or use autocast"
        )
    name = resolve_backend(backend, "cpu" if x_TD.is_cpu else x_TD.device, dtype)
    if name not in _TAKE_SLACK:
        assignment = assignment.compact()
    if biases is not None and name == "naive":
        return naive(x_TD, assignment, up_EHD, down_EDF, activation, biases)
    function = _OURS.get(name) or partial(run_peer, name)
    if biases is not None:
        return with_biases(function, x_TD, assignment, up_EHD, down_EDF, activation, biases)
    return function(x_TD, assignment, up_EHD, down_EDF, activation)


def _autocasts(x_TD: Tensor) -> bool:
    device = x_TD.device.type
    available = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return available and x_TD.dtype != torch.float64


def _check_biases(biases: Biases, up_EHD: Tensor, down_EDF: Tensor) -> None:
    got, fitting = [tuple(bias.shape) for bias in biases], [tuple(up_EHD.shape[:2]), tuple(down_EDF.shape[:2])]
    if got != fitting or {bias.dtype for bias in biases} != {up_EHD.dtype}:
        dtypes = [str(bias.dtype) for bias in biases]
        raise ValueError(
            f"biases {got} of {dtypes} do not fit expert weights, which need {fitting} of {up_EHD.dtype}"
        )


def _check_shapes(
    x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation
) -> None:
    tokens, model_width = x_TD.shape
    experts, outputs, width = down_EDF.shape
    if up_EHD.shape != (experts, width * (2 if activation.gated else 1), model_width) or outputs != model_width:
        raise ValueError(
            f"expert weights {tuple(up_EHD.shape)} and {tuple(down_EDF.shape)} do not fit inputs {tuple(x_TD.shape)} "
            f"with activation {activation.name!r}"
        )
    if assignment.num_tokens != tokens or assignment.num_experts != experts:
        raise ValueError(
            f"the assignment is for {assignment.num_tokens} tokens and {assignment.num_experts} experts, "
            f"the inputs have {tokens} and the weights {experts}"
        )
