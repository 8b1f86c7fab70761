"""Balance between groups of experts, as on one device each: the two losses that DeepSeek-V2 adds to the usual one.

Legend: B rows, T tokens (B S), E experts, G groups of neighbouring experts, N = E / G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment


def device_balance_loss(
    logits_TE: Tensor, assignment: Assignment, groups: int, valid_T: Tensor | None = None, num_rows: int = 1
) -> Tensor:
    """Mean over rows of sum_g f'_g P'_g (DeepSeek-V2, arXiv 2405.04434, eq. 26-28; DeepSeekMoE, arXiv 2401.06066, eq.
    15-17): within a row, f'_g is the mean of its experts' f_e = E load_e / P, P'_g the sum of their mean softmax
    probabilities.

    Equal compute on all devices gives 1, whatever the balance within each. Its weight is 0.05 in DeepSeek-V2, whose T
    (eq. 24) is one sequence.

    Args:
        logits_TE: raw router logits (T, E), row-major.
        assignment: what was executed; its loads carry no gradient.
        groups: G, a divisor of E; group g owns experts g N to (g + 1) N - 1.
        valid_T: boolean (T,), false for padding, or None.
        num_rows: B, a divisor of T; 1 takes the batch as one sequence.

    Returns:
        Float32 scalar; rows without a pair, or of padding, count as zero.
    """
    load_BE = assignment.to_mask().view(num_rows, -1, assignment.num_experts).sum(1).float()
    share_BE = load_BE * assignment.num_experts / load_BE.sum(1, keepdim=True).clamp(min=1)
    share_BG = share_BE.view(num_rows, groups, -1).mean(-1)
    return (share_BG * _group_probs(logits_TE, groups, valid_T, num_rows)).sum(-1).mean()


def communication_balance_loss(
    logits_TE: Tensor,
    assignment: Assignment,
    groups: int,
    most: int,
    valid_T: Tensor | None = None,
    num_rows: int = 1,
) -> Tensor:
    """Mean over rows of sum_g f''_g P''_g (DeepSeek-V2, arXiv 2405.04434, eq. 29-31): within a row, f''_g is G /
    (M T) times the number of tokens that are sent to group g at all, P''_g the sum of its experts' mean softmax
    probabilities.

    Where every token visits M devices, equal traffic gives 1. Its weight is 0.02 in DeepSeek-V2.

    Args:
        logits_TE: raw router logits (T, E), row-major.
        assignment: what was executed; it carries no gradient.
        groups: G, a divisor of E, as above.
        most: M, the most groups that a token may visit; 3 of 8 in DeepSeek-V2.
        valid_T: boolean (T,), false for padding, or None.
        num_rows: B, a divisor of T; 1 takes the batch as one sequence.

    Returns:
        Float32 scalar; rows of padding count as zero.
    """
    visits_TG = assignment.to_mask().view(assignment.num_tokens, groups, -1).any(-1).float()
    sent_BG = _row_means(visits_TG, valid_T, num_rows) * (groups / most)
    return (sent_BG * _group_probs(logits_TE, groups, valid_T, num_rows)).sum(-1).mean()


def _group_probs(logits_TE: Tensor, groups: int, valid_T: Tensor | None, num_rows: int) -> Tensor:
    """Mean probability of each group in each row, (B, G)."""
    probs_BE = _row_means(logits_TE.float().softmax(-1), valid_T, num_rows)
    return probs_BE.view(num_rows, groups, -1).sum(-1)


def _row_means(x_TX: Tensor, valid_T: Tensor | None, num_rows: int) -> Tensor:
    """Means over the valid tokens of each row, (B, X); zero for a row of padding."""
    if valid_T is None:
        return x_TX.view(num_rows, -1, x_TX.shape[-1]).mean(1)
    kept_TX = torch.where(valid_T[:, None], x_TX, 0.0)
    count_B1 = valid_T.view(num_rows, -1).sum(1, keepdim=True).clamp(min=1)
    return kept_TX.view(num_rows, -1, x_TX.shape[-1]).sum(1) / count_B1
