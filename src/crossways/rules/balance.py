"""Balancing losses, one number per router, from the assignment that was executed and the raw logits.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment


def _valid_rows(logits_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    return logits_TE if valid_T is None else logits_TE[valid_T]


def _mean_over_tokens(x_TX: Tensor) -> Tensor:
    """Mean over the first dimension; zero, not NaN, when it is empty."""
    return x_TX.sum(0) / max(x_TX.shape[0], 1)


def load_balance_loss(logits_TE: Tensor, assignment: Assignment, valid_T: Tensor | None = None) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformers, arXiv 2101.03961, eq. 4-6; 1/k: DeepSeekMoE, arXiv 2401.06066, eq. 12).

    f_e is expert e's share of the executed pairs, P_e its mean softmax probability. Both sum to one, so perfect
    balance gives 1 for any k; transformers' `load_balancing_loss_func` counts each of the k choices in full and
    gives k times this.

    Args:
        logits_TE: raw router logits (T, E).
        assignment: what was executed; its loads carry no gradient.
        valid_T: boolean (T,), false for padding, or None.

    Returns:
        Float32 scalar; zero when nothing was chosen or there is nothing but padding.
    """
    probs_E = _mean_over_tokens(_valid_rows(logits_TE, valid_T).float().softmax(-1))
    share_E = assignment.load_E().float() / max(assignment.num_pairs, 1)
    return logits_TE.shape[-1] * torch.dot(share_E, probs_E)


def router_z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    return _mean_over_tokens(_valid_rows(logits_TE, valid_T).float().logsumexp(-1).square())
