"""The `grouped_mm` backend: PyTorch's own grouped matrix product over all pairs at once.

Two calls whatever the number of experts, and on CUDA no host synchronisation: offsets stay on the device.

Legend: T tokens, P pairs, E experts, D model width, F expert width, H rows of the first matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.naive import naive


def grouped(x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation) -> Tensor:
    """Same contract as `naive`.

    Raises:
        ValueError: when the widths do not suit `torch.nn.functional.grouped_mm`, which needs 16-byte rows.
    """
    _check_alignment(up_EHD, down_EDF)
    if assignment.num_pairs == 0:
        # grouped_mm refuses zero rows; there is nothing to be fast about.
        return naive(x_TD, assignment, up_EHD, down_EDF, activation)
    stop_E = assignment.offsets_E1[1:].to(torch.int32)
    x_PD = _without_slack(x_TD.index_select(0, assignment.token_P), assignment)
    up_PH = functional.grouped_mm(x_PD, up_EHD.transpose(1, 2), offs=stop_E)
    hidden_PF = activation(up_PH) * assignment.weight_P.to(x_TD.dtype)[:, None]
    y_PD = functional.grouped_mm(hidden_PF, down_EDF.transpose(1, 2), offs=stop_E)
    return sum_pairs(_without_slack(y_PD, assignment), assignment, x_TD)


def _without_slack(rows_PD: Tensor, assignment: Assignment) -> Tensor:
    """Zero rows for slack, forward and backward: grouped_mm leaves these as they were allocated."""
    return rows_PD.where(assignment.chosen_P()[:, None], 0.0) if assignment.slack else rows_PD


def sum_pairs(y_PD: Tensor, assignment: Assignment, x_TD: Tensor) -> Tensor:
    """Add the pairs' outputs (P, D) up to their tokens (T, D), in at least float32; returned in x's dtype."""
    wide = torch.promote_types(y_PD.dtype, torch.float32)
    y_TD = torch.zeros(x_TD.shape, dtype=wide, device=x_TD.device)
    return y_TD.index_add(0, assignment.token_P, y_PD.to(wide)).to(x_TD.dtype)


def _check_alignment(up_EHD: Tensor, down_EDF: Tensor) -> None:
    multiple = 16 // up_EHD.element_size()
    widths = {"model width": up_EHD.shape[2], "expert width": down_EDF.shape[2]}
    for name, width in widths.items():
        if width % multiple:
            raise ValueError(
                f"backend 'grouped_mm' needs a {name} divisible by {multiple} in {up_EHD.dtype}, got {width}; "
                "use backend 'naive', or 'loop' on a CPU"
            )
