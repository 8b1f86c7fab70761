"""Weights on what experts read instead of on what they return: y = sum over chosen experts of E_e(weight * x).

Llama 4 (transformers' `Llama4TextMoe`), and `moe_apply_probs_on_input` of Megatron-core, which allows it for one
expert per token; here for any number. Any expert compute serves it as it is: each pair becomes a token of its own
that visits its expert with weight one.

Legend: T tokens, P pairs, D width of the input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.experts.grouped import sum_pairs


def on_weighted_inputs(
    experts: Callable[[Tensor, Assignment], Tensor], x_TD: Tensor, assignment: Assignment
) -> Tensor:
    """y[t] = sum over t's pairs of E_e(weight * x[t]). Holds P rows of input and output in memory.

    Args:
        experts: from inputs (T, D) and an assignment to outputs (T, D), any backend's.
        x_TD: inputs.
        assignment: which experts each token visits; gradients reach the weights through what experts read.

    Returns:
        (T, D) in the dtype of `x_TD`; zero rows for tokens that chose nobody.
    """
    weighted_PD = (x_TD[assignment.token_P] * assignment.weight_P[:, None]).to(x_TD.dtype)
    pairs = replace(
        assignment,
        token_P=torch.arange(assignment.num_pairs, device=x_TD.device),
        num_tokens=assignment.num_pairs,
    )
    pairs = pairs.with_weights(torch.ones_like(assignment.weight_P))
    return sum_pairs(experts(weighted_PD, pairs), assignment, x_TD)
