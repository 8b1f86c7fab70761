"""Losses that hold the router's outputs down or level without looking at loads, and ReMoE's that looks at both.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.rules.balance.tokens import mean_over_tokens, valid_rows


def router_z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    return mean_over_tokens(valid_rows(logits_TE, valid_T).float().logsumexp(-1).square())


def entropy_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """sum_e p_e log p_e with p the mean softmax of the tokens (sigma-MoE, Csordas et al. 2023, arXiv 2310.10837,
    section 5): minus the entropy of the average choice, from -log E (balanced) to 0 (one expert).

    A softmax although the layer's scores are sigmoids; 0.001 to 0.01 in the paper.

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    probs_E = mean_over_tokens(valid_rows(logits_TE, valid_T).float().softmax(-1))
    return torch.special.entr(probs_E.clamp(min=torch.finfo(probs_E.dtype).tiny)).sum().neg() * (probs_E.sum() > 0)


def sparsity_loss(scores_TE: Tensor, assignment: Assignment, budget: float, valid_T: Tensor | None = None) -> Tensor:
    """sum_e f_e mean_t s[t, e] with f_e = E load_e / (k T) (ReMoE, Wang et al. 2024, arXiv 2412.14711, section 3): an
    L1 penalty on the scores, heavier for experts that run more than the k T / E times of balance.

    Its weight is adapted by `crossways.router.Sparsity` until k experts run per token.

    Args:
        scores_TE: ReLU scores (T, E).
        assignment: what was executed.
        budget: k, mean experts per token aimed at.
        valid_T: boolean (T,), false for padding, or None.

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    valid_TE = valid_rows(scores_TE, valid_T)
    tokens, num_experts = max(valid_TE.shape[0], 1), scores_TE.shape[-1]
    load_E = assignment.load_E().float() * num_experts / (budget * tokens)
    return torch.dot(load_E, mean_over_tokens(valid_TE.float()))
