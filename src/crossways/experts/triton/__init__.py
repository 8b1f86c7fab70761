"""The `triton` backend: expert compute on NVIDIA GPUs, from Ampere on.

    up.py           gather the tokens, first matrix, activation, routing weight: one kernel
    rows.py         second matrix; also the way back to the inputs
    token_sum.py    each token adds up its own pairs' rows: no atomics, so the same sum every time
    hidden_grad.py  back through second matrix, activation and routing weight: one kernel
    weight_grad.py  gradients of both matrices, experts' segments one by one
    passes.py       the kernels in their order, forward and back
    tiling.py       what kernels that walk over tiles of rows share; layout.py how tensors must lie for them
    configs.py      candidates of block shapes; timing.py how long one of them takes
    plan.py         which rows a program works on, and each token's pairs; made on the device
    op.py           the operators that PyTorch and `torch.compile` see

Triton itself is imported at the first call, not here. Nothing is ever copied to the host.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.experts.activation import Activation

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_experts(
    x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation
) -> Tensor:
    """Same contract as `naive`; first derivatives only."""
    from crossways.experts.triton.op import experts

    return experts(x_TD, assignment, up_EHD, down_EDF, activation)


def why_not_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors of this device and dtype; None when they can.

    Meta tensors get shapes and nothing else; CPU tensors are for Triton's interpreter, in tests.
    """
    if dtype not in DTYPES:
        return f"its kernels take {', '.join(str(known) for known in DTYPES)}, not {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return None if capability >= (8, 0) else f"it needs compute capability 8.0, this device has {capability}"
    if device.type == "cpu" and not interpreted():
        return "its kernels run on CUDA, and these tensors are on the CPU"
    return (
        None if device.type in ("cpu", "meta") else f"its kernels run on CUDA, and these tensors are on {device.type}"
    )


def interpreted() -> bool:
    """Whether Triton made its kernels for its interpreter, which runs them on a CPU, slowly."""
    from triton.runtime.jit import JITFunction

    from crossways.experts.triton.token_sum import token_sum_kernel

    return not isinstance(token_sum_kernel, JITFunction)
