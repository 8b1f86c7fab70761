"""Experts that are one matrix each, such as those of routed attention.

Legend: N rows read, R rows written, P pairs, E experts, I input width, O output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment


@dataclass(frozen=True)
class Wiring:
    """Where pairs read and write, which need not be their tokens."""

    read_P: Tensor
    """Row of the input, int64."""
    write_P: Tensor
    """Row of the output, int64."""
    rows: int
    """R, of the output."""


def linear_experts(x_NI: Tensor, assignment: Assignment, weight_EOI: Tensor, wiring: Wiring) -> Tensor:
    """y[r] = sum over pairs that write to r of weight * W_e x[n], n being what the pair reads.

    One product for each expert that somebody chose; sums in at least float32.

    Args:
        x_NI: inputs.
        assignment: the pairs, without slack.
        weight_EOI: the matrices.
        wiring: rows of input and output for every pair.

    Returns:
        (R, O) in the dtype of the products.
    """
    parts = x_NI[wiring.read_P].split(assignment.load_E().tolist())
    done = [functional.linear(part, weight) for part, weight in zip(parts, weight_EOI, strict=True) if len(part)]
    y_PO = torch.cat(done) if done else functional.linear(x_NI[:0], weight_EOI[0])
    wide = torch.promote_types(y_PO.dtype, torch.float32)
    y_RO = torch.zeros(wiring.rows, weight_EOI.shape[1], dtype=wide, device=y_PO.device)
    return y_RO.index_add(0, wiring.write_P, (y_PO * assignment.weight_P[:, None]).to(wide)).to(y_PO.dtype)
