"""Group-limited token choice: a token's experts come from a few groups of experts. DeepSeek-V2 and V3.

Legend: B batch, S sequence, E experts, T = B * S tokens, K experts per token, G groups of experts, N = E / G.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import bits, routing
from crossways.rules.select.base import Selection, check_budget, check_whole, top_k_index
from crossways.rules.select.top_k import TopK

GroupScore = Literal["top2", "max", "top"]


@dataclass(frozen=True)
class GroupLimited(Selection):
    """S_t = the k best experts within the `topk_group` best of `n_group` equal groups of neighbouring experts.

    DeepSeek-V2 (arXiv 2405.04434, section 2.2.2) ranks a group by its best expert, DeepSeek-V3 (arXiv 2412.19437,
    section 2.1.2) by the sum of its best affinities; in V3's published model those are the two best, biases
    included. Megatron-core sums the best k // topk_group of a group, two for both published models. With groups on
    different devices, a token visits at most `topk_group` of them. V3 entire is score `sigmoid`, `bias_update_rate`,
    `renormalize` and `weight_scale` with this selection.
    """

    name: ClassVar[str] = "group_limited"
    causal = True
    batch_invariant = True
    exact_budget = True

    k: int
    """Experts per token, 1 to topk_group * E / n_group; 6 in V2, 8 in V3."""
    n_group: int = 8
    """Groups, a divisor of E; 8 in V2 and V3."""
    topk_group: int = 4
    """Groups a token may use, 1 to n_group; 3 in V2, 4 in V3."""
    group_score: GroupScore = "top2"
    """What ranks a group: the sum of its two best scores (`top2`, V3), its best (`max`, V2), or the sum of as many as
    a token takes from a group on average (`top`, Megatron-core)."""

    def __post_init__(self) -> None:
        for field in ("k", "n_group", "topk_group"):
            object.__setattr__(self, field, check_whole(self.name, field, getattr(self, field)))
        if self.topk_group > self.n_group:
            raise UserError(
                f"selection 'group_limited': topk_group = {self.topk_group} exceeds n_group = {self.n_group}"
            )
        if self.group_score not in get_args(GroupScore):
            raise UserError(
                f"selection 'group_limited': group_score must be one of {get_args(GroupScore)}, "
                f"got {self.group_score!r}"
            )

    def check(self, num_experts: int) -> None:
        if num_experts % self.n_group:
            raise UserError(
                f"selection 'group_limited': {num_experts} experts do not divide into {self.n_group} groups"
            )
        size = num_experts // self.n_group
        if self.best_of_group > size:
            raise UserError(
                f"selection 'group_limited': groups of {size} have no {self.best_of_group} best experts; use "
                "group_score 'max'"
            )
        check_budget(self.name, self.k, self.topk_group * size)

    @property
    def best_of_group(self) -> int:
        """How many of a group's best scores rank it."""
        return {"max": 1, "top2": 2, "top": max(self.k // self.topk_group, 1)}[self.group_score]

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        if routing.fits(choice_BSE, allowed_BSE):
            limits = self.k, self.n_group, self.best_of_group, self.topk_group
            chosen = bits.of_group_limited(choice_BSE, *limits, allowed_BSE)
            return Assignment.from_bits(chosen, scores_BSE)
        allowed_BSE = torch.ones_like(choice_BSE, dtype=torch.bool) if allowed_BSE is None else allowed_BSE
        within_BSE = self._within(choice_BSE.detach(), allowed_BSE) & allowed_BSE
        return TopK(self.k)(choice_BSE, scores_BSE, within_BSE)

    def _within(self, choice_BSE: Tensor, allowed_BSE: Tensor) -> Tensor:
        """Boolean (B, S, E): the experts of each token's best groups."""
        choice_TGN = choice_BSE.reshape(-1, self.n_group, choice_BSE.shape[-1] // self.n_group)
        allowed_TGN = allowed_BSE.reshape(choice_TGN.shape)
        choice_TGN = choice_TGN.masked_fill(~allowed_TGN, -torch.inf)
        best_TGM = choice_TGN.gather(-1, _best(choice_TGN, self.best_of_group))
        # An expert that must not be chosen adds nothing, instead of ruling out the rest of its group.
        group_TG = best_TGM.masked_fill(best_TGM == -torch.inf, 0.0).sum(-1)
        group_TG = group_TG.masked_fill(~allowed_TGN.any(-1), -torch.inf)
        index_TA = top_k_index(group_TG, self.topk_group)
        chosen_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter(-1, index_TA, True)
        return chosen_TG[..., None].expand_as(choice_TGN).reshape(choice_BSE.shape)


def _best(choice_TGN: Tensor, count: int) -> Tensor:
    """Indices of the `count` best experts of each group, (T, G, count)."""
    return top_k_index(choice_TGN.flatten(0, 1), count).unflatten(0, choice_TGN.shape[:2])
