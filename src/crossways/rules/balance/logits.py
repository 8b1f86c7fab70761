"""Losses that hold the router's outputs down or level without looking at loads, and ReMoE's that looks at both.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.rules.balance.tokens import mean_over_tokens, num_valid, without_padding


def router_z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    squares_T = without_padding(logits_TE, valid_T).float().logsumexp(-1).square()
    return mean_over_tokens(squares_T, valid_T)


def entropy_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """sum_e p_e log p_e with p the mean softmax of the tokens (sigma-MoE, Csordas et al. 2023, arXiv 2310.10837,
    eq. 20-21): minus the entropy of the average choice, from -log E (balanced) to 0 (one expert).

    A softmax although the layer's scores are sigmoids; 0.0001 to 0.001 in the paper.

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    probs_TE = without_padding(logits_TE, valid_T).float().softmax(-1)
    return _negative_entropy(mean_over_tokens(probs_TE, valid_T))


def sequence_entropy_loss(logits_TE: Tensor, num_rows: int, valid_T: Tensor | None = None) -> Tensor:
    """`entropy_loss` of each row by itself, mean over rows (the `time` scope of sigma-MoE's code and of LibMoE).

    Args:
        logits_TE: raw router logits (T, E), row-major.
        num_rows: B, a divisor of T.
        valid_T: boolean (T,), false for padding, or None. Rows of padding count as zero.
    """
    valid_T = (
        torch.ones(logits_TE.shape[0], dtype=torch.bool, device=logits_TE.device) if valid_T is None else valid_T
    )
    probs_TE = torch.where(valid_T[:, None], logits_TE.float().softmax(-1), 0.0)
    probs_BE = probs_TE.view(num_rows, -1, logits_TE.shape[-1]).sum(1)
    probs_BE = probs_BE / valid_T.view(num_rows, -1).sum(1, keepdim=True).clamp(min=1)
    return _negative_entropy(probs_BE).mean()


def mutual_information_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """mean_t H(p_t) - H(mean_t p_t), minus the mutual information of token and expert (Mod-Squad, Chen et al. 2022,
    arXiv 2212.08066, section 3): experts are used alike, and each token is sure of its own; from -log E to 0.

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    probs_TE = without_padding(logits_TE, valid_T).float().softmax(-1)
    certain_T = _negative_entropy(probs_TE)
    return _negative_entropy(mean_over_tokens(probs_TE, valid_T)) - mean_over_tokens(certain_T, valid_T)


def _negative_entropy(probs_XE: Tensor) -> Tensor:
    """sum_e p log p of each row (X,); zero, gradient too, for rows of zeros."""
    entropy_X = torch.special.entr(probs_XE.clamp(min=torch.finfo(probs_XE.dtype).tiny)).sum(-1)
    return -entropy_X * (probs_XE.sum(-1) > 0)


def sparsity_loss(scores_TE: Tensor, assignment: Assignment, budget: float, valid_T: Tensor | None = None) -> Tensor:
    """sum_e f_e mean_t s[t, e] with f_e = E load_e / (k T) (ReMoE, Wang et al. 2024, arXiv 2412.14711, section 3.4,
    eq. 10-11): an L1 penalty on the scores, heavier for experts that run more than the k T / E times of balance.

    Its weight is adapted by `crossways.router.Sparsity` until k experts run per token.

    Args:
        scores_TE: ReLU scores (T, E).
        assignment: what was executed.
        budget: k, mean experts per token aimed at.
        valid_T: boolean (T,), false for padding, or None.

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    tokens, num_experts = num_valid(scores_TE, valid_T), scores_TE.shape[-1]
    load_E = assignment.load_E().float() * num_experts / (budget * tokens)
    return torch.dot(load_E, mean_over_tokens(scores_TE.float(), valid_T))
