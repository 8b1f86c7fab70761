"""Losses for routers that choose among more slots than there are experts.

Legend: T tokens, S slots of a router, E experts.
"""

from __future__ import annotations

from torch import Tensor

from crossways.rules.balance.load import normalised
from crossways.rules.balance.tokens import mean_over_tokens


def over_experts(load_S: Tensor, probs_TS: Tensor, num_experts: int, negated: bool) -> tuple[Tensor, Tensor]:
    """Loads (E,) and probabilities (T, E) of the experts that compute: both slots of an expert together, and the
    probabilities of each token scaled to sum to one without zero-computation experts.

    `balance_product` of these is the balance loss of TC-MoE (Yan et al., ICLR 2025) as LibMoE reads it, taken over
    the batch and times E; the paper's own formula we have not seen.

    Args:
        load_S: what is counted of each slot, (S,).
        probs_TS: non-negative (T, S).
        num_experts: E; the first E slots are theirs.
        negated: whether the next E slots subtract them.
    """
    load_E, probs_TE = load_S[:num_experts], probs_TS[:, :num_experts]
    if negated:
        load_E = load_E + load_S[num_experts : 2 * num_experts]
        probs_TE = probs_TE + probs_TS[:, num_experts : 2 * num_experts]
    return load_E, normalised(probs_TE)


def zero_reward(scores_TS: Tensor, zero: tuple[int, int], valid_T: Tensor | None = None) -> Tensor:
    """Minus the mean over tokens of the zero experts' share of the scores, from -1 to 0: the reward loss of TC-MoE
    (Yan et al., ICLR 2025, as LibMoE reads it), which buys fewer executed experts.

    Args:
        scores_TS: non-negative (T, S).
        zero: the first zero expert, and the one after the last.
        valid_T: boolean (T,), false for padding, or None.
    """
    return -mean_over_tokens(normalised(scores_TS)[:, slice(*zero)].sum(-1), valid_T)
