"""The operators that PyTorch sees: opaque to `torch.compile`, so that a compiled layer has no graph break.

Legend: T tokens, P pairs, E experts, D model width, F expert width, H rows of the first matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.triton.layout import pad_widths
from crossways.experts.triton.passes import backward_pass, forward_pass


def experts(x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation) -> Tensor:
    """Same contract as `naive`; first derivatives only."""
    width = x_TD.shape[1]
    x_TD, up_EHD, down_EDF = pad_widths(x_TD, up_EHD, down_EDF)
    inputs = (x_TD, assignment.weight_P, up_EHD, down_EDF)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    y_TD, *_ = forward(*inputs, assignment.token_P, assignment.offsets_E1, activation.name, save)
    return y_TD if y_TD.shape[1] == width else y_TD[:, :width]


forward = torch.library.custom_op("crossways::experts", forward_pass, mutates_args=())
backward = torch.library.custom_op("crossways::experts_backward", backward_pass, mutates_args=())


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
    # Nobody differentiates what was kept, and PyTorch would fill a gradient of it with zeros: (P, H) for each layer.
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_TD: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_TD is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:4])
    grads = backward(grad_TD, *ctx.saved_tensors, ctx.activation, wanted)
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=True)), None, None, None, None


forward.register_autograd(_differentiate, setup_context=_keep)
