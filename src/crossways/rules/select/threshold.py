"""Threshold: a pair is chosen when its score reaches a cutoff. The decode twin of the rules that look around.

Legend: B batch, S sequence, E experts, T = B * S tokens, C cutoffs (1 or E).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import bits, budgeted, routing
from crossways.rules.select.base import Selection, check_budget, check_number, valid_tokens, whole


@dataclass(frozen=True, eq=False)
class Threshold(Selection):
    """X = {(t, e): score[t, e] >= cutoff}: causal and batch-invariant, with the budget met on average only.

    By the optimality condition of USMoE's linear program (arXiv 2503.22996v2, proposition 3.1) the top-c pairs are
    those above a common cutoff, the price of one unit of budget; expert choice has one such price per expert. A
    router learns the cutoff as a running estimate (`Router.observe`) and hands it over with `at`.
    """

    name: ClassVar[str] = "threshold"
    causal = True
    batch_invariant = True
    exact_budget = False

    k: float = 2.0
    """Mean experts per token that the running cutoff aims at, above 0 and at most E; unused with a fixed `value`."""
    per_expert: bool = False
    """One cutoff per expert, each spending k / E (the twin of expert choice), instead of one for all."""
    value: float | Tensor | None = None
    """A fixed cutoff (a number in the scores' range, e.g. 0.05 to 0.5), or None to use the router's estimate."""

    def __post_init__(self) -> None:
        if self.value is not None and not isinstance(self.value, Tensor):
            check_number(self.name, "value", self.value)
            if math.isnan(self.value):
                raise UserError("selection 'threshold': value must be a number, got nan")

    def check(self, num_experts: int) -> None:
        if self.value is None:
            check_budget(self.name, self.k, num_experts)

    def at(self, cutoff_C: Tensor) -> Threshold:
        """This rule with the given cutoffs, (1,) or (E,)."""
        return Threshold(self.k, self.per_expert, cutoff_C)

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        if self.value is None:
            raise UserError(
                "selection 'threshold' has no cutoff: give `value`, or train or calibrate the router first"
            )
        num_experts, limit = choice_BSE.shape[-1], self.value
        cutoff_C = limit if isinstance(limit, Tensor) else None
        if routing.fits(choice_BSE, allowed_BSE, cutoff_C) and (cutoff_C is None or cutoff_C.dtype == torch.float32):
            chosen = bits.of_cutoff(choice_BSE, limit, allowed_BSE)
            return Assignment.from_bits(chosen, scores_BSE)
        mask_BSE = ~(choice_BSE < self.value)  # unlike >=, true for a NaN score
        if allowed_BSE is not None:
            mask_BSE = mask_BSE & allowed_BSE
        return Assignment.from_mask(mask_BSE.reshape(-1, num_experts), scores_BSE.reshape(-1, num_experts))

    def cutoff(self, choice_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Tensor | None:
        return pooled_cutoff(self, choice_BSE, allowed_BSE) if self.value is None else None


def pooled_cutoff(twin: Threshold, choice_BSE: Tensor, allowed_BSE: Tensor | None) -> Tensor:
    """The cutoff at which `twin` would spend exactly its budget on all tokens of the batch pooled.

    Pooling the batch, rather than averaging the cutoffs of its groups, makes the mean budget come out right: the
    number of pairs above a cutoff is not linear in the cutoff.

    Returns:
        Float32 (1,), or (E,) for a per-expert twin; NaN for a batch of padding alone. No gradient.
    """
    with torch.no_grad():
        num_experts = choice_BSE.shape[-1]
        shares = num_experts if twin.per_expert else 1
        valid_T = valid_tokens(allowed_BSE, choice_BSE).flatten()
        pools_TE = choice_BSE.reshape(-1, num_experts)
        if allowed_BSE is not None:
            pools_TE = pools_TE.masked_fill(~valid_T[:, None], -torch.inf)
        pools_CN = pools_TE.t() if twin.per_expert else pools_TE.reshape(1, -1)
        # The rank is known to the device alone; the host knows the one that all tokens, if valid, would have.
        most = min(max(whole(twin.k * len(valid_T) / shares), 1), pools_CN.shape[1])
        if most == 0:
            return choice_BSE.new_full((shares,), torch.nan)
        num_valid = valid_T.sum()
        rank = (num_valid.double() * twin.k / shares + 0.5).floor().clamp(min=1).long().clamp(max=most)
        if routing.fits(pools_TE):
            if twin.per_expert:
                least_C = budgeted.least_of_columns(pools_TE[None], rank.expand(1, shares))[0]
            else:
                least_C = budgeted.least_of_shared(pools_TE, budgeted.Groups(1, len(pools_TE), 0, 1), rank[None])
            return torch.where(num_valid > 0, least_C, torch.nan)
        best_CN = pools_CN.topk(most, dim=-1).values
        cutoff_C = best_CN.index_select(1, (rank - 1)[None])[:, 0].float()
        return torch.where(num_valid > 0, cutoff_C, torch.nan)
