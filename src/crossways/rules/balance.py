"""Balancing losses, one number per router, from the assignment that was executed and the raw logits or scores.

Legend: T tokens, E experts, B rows of the batch, S tokens of a row, P chosen pairs.
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


def load_balance_loss(
    logits_TE: Tensor, assignment: Assignment, valid_T: Tensor | None = None, share_E: Tensor | None = None
) -> Tensor:
    """E * sum_e f_e P_e (Switch Transformers, arXiv 2101.03961, eq. 4-6; 1/k: DeepSeekMoE, arXiv 2401.06066, eq. 13).

    f_e is expert e's share of the executed pairs (Switch counts those asked for, before any is dropped, GShard, arXiv
    2006.16668, algorithm 1, first choices alone), P_e its mean softmax probability. Both sum to one, so perfect
    balance gives 1 for any k; transformers' `load_balancing_loss_func` counts each of the k choices in full and
    gives k times this.

    Args:
        logits_TE: raw router logits (T, E).
        assignment: what was executed; its loads carry no gradient.
        valid_T: boolean (T,), false for padding, or None.
        share_E: factor on each expert's term, float32 (E,), or None for one. MoE++ (arXiv 2410.07348, eq. 7) takes
            tau <= 1 for zero-computation experts, so that the balance point sends them more tokens; its formula lacks
            E / k, so its weight 0.01 is 0.01 k / E here.

    Returns:
        Float32 scalar; zero when nothing was chosen or there is nothing but padding.
    """
    probs_E = _mean_over_tokens(_valid_rows(logits_TE, valid_T).float().softmax(-1))
    load_E = assignment.load_E().float() / max(assignment.num_pairs, 1)
    return logits_TE.shape[-1] * torch.dot(load_E if share_E is None else load_E * share_E, probs_E)


def router_z_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5).

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    return _mean_over_tokens(_valid_rows(logits_TE, valid_T).float().logsumexp(-1).square())


def sequence_balance_loss(
    scores_TE: Tensor, assignment: Assignment, num_rows: int, valid_T: Tensor | None = None
) -> Tensor:
    """Mean over rows of E * sum_e f_e P_e within one row (DeepSeek-V3, arXiv 2412.19437, eq. 17-20): f_e is expert
    e's share of the row's executed pairs, P_e its mean score after each token's scores were scaled to sum to one.

    Eq. 18 counts the k best scores without bias and groups, here the executed pairs count. With softmax scores this
    is DeepSeek-V2's expert-level loss (arXiv 2405.04434, eq. 23-25). It keeps single sequences from collapsing on few
    experts where a bias balances the batch as a whole; DeepSeek-V3 gives it the weight 0.0001. Rows of padding count
    as zero.

    Args:
        scores_TE: non-negative scores (T, E), row-major.
        assignment: what was executed.
        num_rows: B, a divisor of T.
        valid_T: boolean (T,), false for padding, or None.
    """
    valid_T = scores_TE.new_ones(scores_TE.shape[0], dtype=torch.bool) if valid_T is None else valid_T
    share_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
    share_BSE = torch.where(valid_T[:, None], share_TE, 0.0).view(num_rows, -1, scores_TE.shape[-1])
    probs_BE = share_BSE.sum(1) / valid_T.view(num_rows, -1).sum(1, keepdim=True).clamp(min=1)
    load_BE = assignment.to_mask().view(share_BSE.shape).sum(1).float()
    load_BE = load_BE / load_BE.sum(1, keepdim=True).clamp(min=1)
    return scores_TE.shape[-1] * (load_BE * probs_BE).sum(-1).mean()


def importance_loss(assignment: Assignment) -> Tensor:
    """CV(importance)^2 with importance_e the sum of expert e's executed weights (Shazeer et al. 2017, arXiv
    1701.06538, eq. 6-7): squared standard deviation over squared mean, zero for equal importance, E - 1 for one
    expert alone.

    The paper's second loss, on a smooth estimate of the load, needs the noise of its gate and is not among these.

    Returns:
        Float32 scalar; zero when nothing was chosen.
    """
    weight_P = assignment.weight_P.float()
    importance_E = weight_P.new_zeros(assignment.num_experts).index_add(0, assignment.expert_P, weight_P)
    mean = importance_E.mean()
    return (importance_E - mean).square().mean() / mean.square().clamp(min=torch.finfo(mean.dtype).tiny)


def entropy_loss(logits_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """sum_e p_e log p_e with p the mean softmax of the tokens (sigma-MoE, Csordas et al. 2023, arXiv 2310.10837,
    section 5, eq. 20-21): minus the entropy of the average choice, from -log E (balanced) to 0 (one expert).

    A softmax although the layer's scores are sigmoids; 0.0001 to 0.001 in the paper.

    Returns:
        Float32 scalar; zero when there is nothing but padding.
    """
    probs_E = _mean_over_tokens(_valid_rows(logits_TE, valid_T).float().softmax(-1))
    return torch.special.entr(probs_E.clamp(min=torch.finfo(probs_E.dtype).tiny)).sum().neg() * (probs_E.sum() > 0)


def sparsity_loss(scores_TE: Tensor, assignment: Assignment, budget: float, valid_T: Tensor | None = None) -> Tensor:
    """sum_e f_e mean_t s[t, e] with f_e = E load_e / (k T) (ReMoE, Wang et al. 2024, arXiv 2412.14711, eq. 10-11): an
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
    valid_TE = _valid_rows(scores_TE, valid_T)
    tokens, num_experts = max(valid_TE.shape[0], 1), scores_TE.shape[-1]
    load_E = assignment.load_E().float() * num_experts / (budget * tokens)
    return torch.dot(load_E, _mean_over_tokens(valid_TE.float()))
