"""Experts with biases on any backend that knows none.

The first bias is one more column of the first matrix, whose input is always one; the second adds each token's
weighted sum of its experts' biases to what comes out. The columns make a copy of both stacks at every call: next to
nothing beside the products of a training batch, most of the work where a step decodes a few tokens.

Legend: T tokens, E experts, D model width, F expert width, H rows of the first matrix, C columns appended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.experts.activation import Activation


class Biases(NamedTuple):
    """What experts add after each of their two products, in the dtype of the matrices."""

    up_EH: Tensor
    """After the first, before the activation."""
    down_ED: Tensor
    """After the second; weighted with the expert's output."""


def with_biases(
    compute: Callable[[Tensor, Assignment, Tensor, Tensor, Activation], Tensor],
    x_TD: Tensor,
    assignment: Assignment,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: Activation,
    biases: Biases,
) -> Tensor:
    """y[t] = sum over t's pairs of weight * (down_e(activation(up_e(x[t]) + up_bias_e)) + down_bias_e).

    Args:
        compute: a backend, with the contract of `naive`.
        biases: of all experts.

    The others, and what is returned, are as for `naive`.
    """
    width = x_TD.shape[1]
    appended = _columns(width, x_TD.element_size())
    one_TC = x_TD.new_ones(len(x_TD), appended)
    bias_EHC = functional.pad(biases.up_EH[..., None], (0, appended - 1))
    y_TD = compute(
        torch.cat([x_TD, one_TC], dim=1),
        assignment,
        torch.cat([up_EHD, bias_EHC], dim=2),
        functional.pad(down_EDF, (0, 0, 0, appended)),
        activation,
    )[:, :width]
    return y_TD + assignment.to_dense().to(y_TD.dtype) @ biases.down_ED


def _columns(width: int, element_size: int) -> int:
    """At least one, so many that rows of the matrices stay whole multiples of 16 bytes, as some backends need."""
    multiple = 16 // element_size
    return multiple - width % multiple
