"""Expert choice: every expert takes its best tokens.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import bits, budgeted, routing
from crossways.rules.select.base import Selection, budgets, check_budget, top_of_columns, valid_tokens
from crossways.rules.select.threshold import Threshold, pooled_cutoff

Group = Literal["sequence", "batch"]


@dataclass(frozen=True)
class ExpertChoice(Selection):
    """Each expert takes the n k / E tokens of greatest score in its group of n (Zhou et al. 2022, arXiv 2202.09368,
    section 3.2, eq. 1-2: k = n c / e, S = softmax over experts, top-k over tokens, weights are the raw scores).

    Loads are equal by construction; a token may get from zero to E experts. Later tokens, and with group `batch`
    other rows, take places from earlier ones, so the decode twin is one threshold per expert.
    """

    name: ClassVar[str] = "expert_choice"
    causal = False
    exact_budget = True

    k: float
    """Mean experts per token (the paper's capacity factor c), above 0 and at most E."""
    group: Group = "sequence"
    """Among which tokens an expert chooses: those of one `sequence`, or of the whole `batch` as in the paper."""

    @property
    def batch_invariant(self) -> bool:
        """Only the tokens of one row compete under group `sequence`."""
        return self.group == "sequence"

    def __post_init__(self) -> None:
        if self.group not in get_args(Group):
            raise UserError(f"selection 'expert_choice': group must be one of {get_args(Group)}, got {self.group!r}")

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        batch, _, num_experts = choice_BSE.shape
        groups = batch if self.group == "sequence" else 1

        choice_GNE = choice_BSE if self.group == "sequence" else choice_BSE.reshape(groups, -1, num_experts)
        if routing.fits(choice_GNE, allowed_BSE):
            return Assignment.from_bits(self._bits(choice_GNE, allowed_BSE), scores_BSE)
        allowed_GNE = None if allowed_BSE is None else allowed_BSE.reshape(choice_GNE.shape)
        tokens_G = valid_tokens(allowed_BSE, choice_BSE).reshape(groups, -1).sum(-1)
        capacity_GE = budgets(tokens_G, self.k, num_experts)[:, None].expand(-1, num_experts)
        most = budgets(choice_BSE[..., 0].numel() // max(groups, 1), self.k, num_experts)
        mask_GNE = top_of_columns(choice_GNE, allowed_GNE, capacity_GE, most)
        mask_TE = mask_GNE.reshape(-1, num_experts)
        bound = groups * num_experts * most
        return Assignment.from_mask(mask_TE, scores_BSE.reshape(-1, num_experts), most=bound)

    def _bits(self, choice_GNE: Tensor, allowed_BSE: Tensor | None) -> bits.Bits:
        groups, tokens, num_experts = choice_GNE.shape
        budget: int | Tensor = budgets(tokens, self.k, num_experts)
        if allowed_BSE is not None:
            tokens_G = allowed_BSE.any(-1).reshape(groups, -1).sum(-1)
            budget = budgets(tokens_G, self.k, num_experts)[:, None].expand(-1, num_experts)
        return budgeted.of_column_budgets(choice_GNE, budget, allowed_BSE)

    def decode_twin(self) -> Threshold:
        return Threshold(k=self.k, per_expert=True)

    def cutoff(self, choice_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Tensor:
        return pooled_cutoff(self.decode_twin(), choice_BSE, allowed_BSE)
