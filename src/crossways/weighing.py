"""How the scores of the chosen pairs become their weights.

Legend: T tokens, E experts, P pairs.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError

Named = Literal["softmax", "with_zero"]
Renormalize = bool | str
"""True, false, or one of `Named`."""


def check_renormalize(value: object, zero_experts: int) -> None:
    """Raise `UserError` unless `value` says how to scale, and there is a zero expert where it needs one."""
    if not isinstance(value, bool) and value not in get_args(Named):
        raise UserError(f"renormalize must be true, false or one of {get_args(Named)}, got {value!r}")
    if value == "with_zero" and not zero_experts:
        raise UserError("renormalize 'with_zero' counts the scores of zero experts: set zero_experts, or take true")


def weighed(
    assignment: Assignment, scores_TE: Tensor, renormalize: Renormalize, zero: tuple[int, int], scale: float
) -> Assignment:
    """The same pairs, with each token's scores as they are, or scaled, and then multiplied by `scale`.

    Args:
        assignment: the chosen pairs, weighing what they score.
        scores_TE: all scores (T, E).
        renormalize: false for the scores as they are; true to have each token's sum to one; `softmax` for the softmax
            of each token's chosen scores (the second softmax of X-MoE in LibMoE: of values in [0, 1], so never far
            from level); `with_zero` to have the chosen scores but those of zero experts, and the scores of all zero
            experts, chosen or not, sum to one together (TC-MoE, Yan et al., ICLR 2025, the authors' code).
        zero: the first zero expert, and the one after the last.
        scale: factor on all weights.
    """
    if renormalize == "softmax":
        assignment = assignment.softmaxed()
    elif renormalize == "with_zero":
        assignment = _with_zero(assignment, scores_TE, *zero)
    elif renormalize:
        assignment = assignment.renormalized()
    return assignment if scale == 1.0 else assignment.with_weights(assignment.weight_P * scale)


def _with_zero(assignment: Assignment, scores_TE: Tensor, first: int, end: int) -> Assignment:
    computing_P = (assignment.expert_P < first) | (assignment.expert_P >= end)
    computing = assignment.with_weights(assignment.weight_P.where(computing_P, 0.0))
    sum_P = (computing.weight_sum_T() + scores_TE[:, first:end].sum(-1))[assignment.token_P]
    if assignment.slack:
        sum_P = sum_P.where(assignment.chosen_P(), 1.0)  # 0 / 0 would reach the gradients
    return assignment.with_weights(assignment.weight_P / sum_P)
