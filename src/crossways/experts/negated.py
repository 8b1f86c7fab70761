"""Experts that may also be subtracted: a second slot for each, behind all that add.

Legend: T tokens, E experts, P pairs.
"""

from __future__ import annotations

from crossways.assignment import Assignment


def signed(assignment: Assignment) -> Assignment:
    """Pairs of E experts, with weights of either sign, from pairs of 2 E slots: slot e adds expert e, slot E + e
    subtracts it (TC-MoE, Yan et al., ICLR 2025: the expert space is {-1, 0, 1} times the experts).

    Scores and weights of slots are not negative; the sign is the slot's. A token in both slots of an expert executes
    it once, with the difference of the weights. Gradients flow to both.

    Args:
        assignment: pairs of 2 E slots.
    """
    experts = assignment.num_experts // 2
    mask_TS, weight_TS = assignment.to_mask(), assignment.to_dense()
    return Assignment.from_mask(
        mask_TS[:, :experts] | mask_TS[:, experts:],
        weight_TS[:, :experts] - weight_TS[:, experts:],
        most=assignment.num_pairs,
    )
