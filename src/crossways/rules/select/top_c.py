"""Global top-c, the mechanism of USMoE: all pairs of a group compete for one budget.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group, C = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import bits, budgeted, routing
from crossways.rules.select.base import Selection, budgets, check_budget, top_of_groups, valid_tokens
from crossways.rules.select.threshold import Threshold, pooled_cutoff

Group = Literal["sequence", "batch", "position"]


@dataclass(frozen=True)
class TopC(Selection):
    """The c pairs of greatest score in each group, c = round(k * tokens of the group) (USMoE, Do et al. 2025, arXiv
    2503.22996v2, proposition 3.1: the optimum of max sum x_te s_te subject to sum x_te <= c, x in {0, 1}).

    A token may get from zero to E experts. Padding neither competes nor adds to c. Groups: `sequence` as in the
    authors' training-free code, `position` (across the batch at one time step) as in their from-scratch code,
    `batch` for all tokens at once. No group is safe for generation: within a sequence later tokens take budget from
    earlier ones, across a batch other rows do; the decode twin is a threshold.
    """

    name: ClassVar[str] = "top_c"
    exact_budget = True

    k: float
    """Mean experts per token, above 0 and at most E; may be fractional and below 1."""
    group: Group = "sequence"
    """Which tokens share a budget: `sequence`, `batch` or `position`."""

    @property
    def causal(self) -> bool:
        """Only the tokens of one time step compete under group `position`."""
        return self.group == "position"

    @property
    def batch_invariant(self) -> bool:
        """Only the tokens of one row compete under group `sequence`."""
        return self.group == "sequence"

    def __post_init__(self) -> None:
        if self.group not in get_args(Group):
            raise UserError(f"selection 'top_c': group must be one of {get_args(Group)}, got {self.group!r}")

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        batch, sequence, num_experts = choice_BSE.shape
        if routing.fits(choice_BSE, allowed_BSE):
            return Assignment.from_bits(self._bits(choice_BSE, allowed_BSE), scores_BSE)
        tokens_G = self._grouped(valid_tokens(allowed_BSE, choice_BSE)[..., None]).sum(-1)
        choice_GN = self._grouped(choice_BSE)
        groups, most = len(choice_GN), budgets(choice_GN.shape[1] // num_experts, self.k)
        mask_GN = top_of_groups(
            choice_GN, None if allowed_BSE is None else self._grouped(allowed_BSE), budgets(tokens_G, self.k), most
        )
        mask_TE = self._ungrouped(mask_GN, batch, sequence).reshape(-1, num_experts)
        return Assignment.from_mask(mask_TE, scores_BSE.reshape(-1, num_experts), most=groups * most)

    def _bits(self, choice_BSE: Tensor, allowed_BSE: Tensor | None) -> bits.Bits:
        batch, sequence, _ = choice_BSE.shape
        groups = {
            "sequence": budgeted.Groups(batch, sequence, sequence, 1),
            "batch": budgeted.Groups(1, batch * sequence, 0, 1),
            "position": budgeted.Groups(sequence, batch, 1, sequence),
        }[self.group]
        budget: int | Tensor = budgets(groups.n, self.k)
        if allowed_BSE is not None:
            budget = budgets(self._grouped(allowed_BSE.any(-1, keepdim=True)).sum(-1), self.k)
        return budgeted.of_shared_budgets(choice_BSE, groups, budget, allowed_BSE)

    def _grouped(self, x_BSE: Tensor) -> Tensor:
        """(B, S, *) to (G, N), one group a row."""
        if self.group == "batch":
            return x_BSE.reshape(1, -1)
        by_group = x_BSE if self.group == "sequence" else x_BSE.transpose(0, 1)
        return by_group.flatten(1)

    def _ungrouped(self, x_GN: Tensor, batch: int, sequence: int) -> Tensor:
        if self.group == "position":
            return x_GN.reshape(sequence, batch, -1).transpose(0, 1)
        return x_GN.reshape(batch, sequence, -1)

    def decode_twin(self) -> Threshold:
        return Threshold(k=self.k)

    def cutoff(self, choice_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Tensor:
        return pooled_cutoff(self.decode_twin(), choice_BSE, allowed_BSE)
