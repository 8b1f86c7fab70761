"""The balance loss of StableMoE: affinities are pushed down where an expert has too many tokens, and up elsewhere.

Legend: T tokens, E experts, P chosen pairs.
"""

from __future__ import annotations

from torch import Tensor

from crossways.assignment import Assignment
from crossways.rules.balance.tokens import num_valid


def excess_load_loss(logits_TE: Tensor, assignment: Assignment, valid_T: Tensor | None = None) -> Tensor:
    """(1 / T) sum_e (n_e - n) / n sum_{t in A_e} sigmoid(s[t, e]) (StableMoE, Dai et al. 2022, arXiv 2204.08396,
    eq. 8, the balance loss of stage 1): A_e are the n_e tokens of expert e, n is their mean number.

    Unlike Switch's loss it moves only the affinity of pairs that were executed. The paper and its code sum over the
    tokens of a batch, and so do they with the cross-entropy; divided by T both are means. Its weight is 0.3 in the
    paper. Not bounded below by balance: it is negative where tokens are surer of idle experts than of busy
    ones.

    Args:
        logits_TE: raw router logits (T, E).
        assignment: what was executed; its loads carry no gradient.
        valid_T: boolean (T,), false for padding, or None.

    Returns:
        Float32 scalar; zero for equal loads, and when nothing was chosen.
    """
    load_E = assignment.load_E().float()
    excess_E = load_E / load_E.mean().clamp(min=1 / assignment.num_experts) - 1
    affinity_P = logits_TE.float()[assignment.token_P, assignment.expert_P].sigmoid()
    moved_P = excess_E[assignment.expert_P] * affinity_P
    if assignment.slack:
        moved_P = moved_P.where(assignment.chosen_P(), 0.0)
    return moved_P.sum() / num_valid(logits_TE, valid_T)
