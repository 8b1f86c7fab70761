"""Transformers' own expert implementations, run on a ragged assignment.

They expect K experts for every token; each of our pairs is handed over as a token with K = 1, so ragged assignments
and tokens that chose nobody need no padding.

Legend: P pairs, D model width, H rows of the first matrix, F expert width.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from crossways.assignment import Assignment
from crossways.experts.activation import Activation
from crossways.experts.grouped import sum_pairs
from crossways.experts.naive import naive

PREFIX = "transformers:"
_PLAIN = ("grouped_mm", "batched_mm")
"""Written in plain PyTorch; the others are kernels downloaded at first use, for CUDA."""


def peer_names() -> list[str]:
    """The registered implementations as backend names, such as `transformers:batched_mm`."""
    return [PREFIX + name for name in ALL_EXPERTS_FUNCTIONS.valid_keys()]


def why_not_peer(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run there, or None."""
    short = name.removeprefix(PREFIX)
    if short == "grouped_mm" and dtype == torch.float64:
        return f"torch.nn.functional.grouped_mm does not take {dtype}"
    if short not in _PLAIN and device.type != "cuda":
        return f"its kernel runs on CUDA only, and the tensors are on {device.type}"
    return None


def run_peer(
    name: str, x_TD: Tensor, assignment: Assignment, up_EHD: Tensor, down_EDF: Tensor, activation: Activation
) -> Tensor:
    """Same contract as `naive`, through `ALL_EXPERTS_FUNCTIONS[name]`.

    Raises:
        ValueError: for an activation other than swiglu with an implementation that has SiLU built in.
    """
    short = name.removeprefix(PREFIX)
    if short not in _PLAIN and activation.name != "swiglu":
        raise ValueError(f"backend {name!r} has SwiGLU built in, but the experts use {activation.name!r}")
    if assignment.num_pairs == 0:
        return naive(x_TD, assignment, up_EHD, down_EDF, activation)
    y_PD = ALL_EXPERTS_FUNCTIONS[short](
        _as_module(up_EHD, down_EDF, activation),
        x_TD.index_select(0, assignment.token_P),
        assignment.expert_P[:, None],
        assignment.weight_P.to(x_TD.dtype)[:, None],
    )
    return sum_pairs(y_PD, assignment, x_TD)


def _as_module(up_EHD: Tensor, down_EDF: Tensor, activation: Activation) -> SimpleNamespace:
    """What the implementations read from the module they are a method of."""
    return SimpleNamespace(
        num_experts=len(up_EHD),
        has_gate=activation.gated,
        has_bias=False,
        has_post_expert_norm=False,
        is_transposed=False,
        is_concatenated=True,
        _is_expert_parallel=False,
        config=SimpleNamespace(hidden_act="silu"),
        gate_up_proj=up_EHD,
        up_proj=up_EHD,
        down_proj=down_EDF,
        act_fn=activation.function,
        _apply_gate=activation,
    )
