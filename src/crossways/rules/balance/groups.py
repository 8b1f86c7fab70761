"""Balance between groups of experts, as on one device each: the two losses that DeepSeek-V2 adds to the usual one.

Legend: T tokens, E experts, G groups of neighbouring experts, N = E / G.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.rules.balance.tokens import mean_over_tokens, valid_rows


def device_balance_loss(
    logits_TE: Tensor, assignment: Assignment, groups: int, valid_T: Tensor | None = None
) -> Tensor:
    """sum_g f'_g P'_g (DeepSeek-V2, arXiv 2405.04434, eq. 26-28; DeepSeekMoE, arXiv 2401.06066, eq. 15-17): f'_g is
    the mean of its experts' f_e = E load_e / P, P'_g the sum of their mean softmax probabilities.

    Equal compute on all devices gives 1, whatever the balance within each. Its weight is 0.05 in DeepSeek-V2.

    Args:
        logits_TE: raw router logits (T, E).
        assignment: what was executed; its loads carry no gradient.
        groups: G, a divisor of E; group g owns experts g N to (g + 1) N - 1.
        valid_T: boolean (T,), false for padding, or None.

    Returns:
        Float32 scalar; zero when nothing was chosen or there is nothing but padding.
    """
    share_E = assignment.load_E().float() * assignment.num_experts / max(assignment.num_pairs, 1)
    return torch.dot(share_E.view(groups, -1).mean(-1), _group_probs(logits_TE, groups, valid_T))


def communication_balance_loss(
    logits_TE: Tensor, assignment: Assignment, groups: int, most: int, valid_T: Tensor | None = None
) -> Tensor:
    """sum_g f''_g P''_g (DeepSeek-V2, arXiv 2405.04434, eq. 29-31): f''_g is G / (M T) times the number of tokens
    that are sent to group g at all, P''_g the sum of its experts' mean softmax probabilities.

    Where every token visits M devices, equal traffic gives 1. Its weight is 0.02 in DeepSeek-V2.

    Args:
        logits_TE: raw router logits (T, E).
        assignment: what was executed; it carries no gradient.
        groups: G, a divisor of E, as above.
        most: M, the most groups that a token may visit; 3 of 8 in DeepSeek-V2.
        valid_T: boolean (T,), false for padding, or None.

    Returns:
        Float32 scalar; zero when nothing was chosen or there is nothing but padding.
    """
    visits_TG = assignment.to_mask().view(assignment.num_tokens, groups, -1).any(-1).float()
    sent_G = mean_over_tokens(valid_rows(visits_TG, valid_T)) * (groups / most)
    return torch.dot(sent_G, _group_probs(logits_TE, groups, valid_T))


def _group_probs(logits_TE: Tensor, groups: int, valid_T: Tensor | None) -> Tensor:
    probs_E = mean_over_tokens(valid_rows(logits_TE, valid_T).float().softmax(-1))
    return probs_E.view(groups, -1).sum(-1)
