"""BASE: the balanced assignment of tokens to experts with the greatest total affinity.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group, C = places per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.rules.select.base import Selection, check_budget, valid_tokens
from crossways.rules.select.top_k import TopK

Group = Literal["sequence", "batch"]


@dataclass(frozen=True)
class Base(Selection):
    """One expert for each token, maximising the total of the logits subject to equal loads (BASE layers, Lewis et al.
    2021, arXiv 2103.16716, section 3.2.1, eq. 2: a linear assignment problem).

    Where n tokens do not divide by E experts, each takes at most ceil(n / E). Chooses by the logits h w_e and weighs
    by the score, which is `sigmoid` in the paper (eq. 1). Every token's place depends on all others; the decode twin
    is the greedy choice that the paper uses for evaluation (section 3.2.2). Solved on the CPU, one group after the
    other: for studies, not for speed (a group of 1,024 tokens takes tens of milliseconds).
    """

    name: ClassVar[str] = "base"
    chooses_by = "logits"
    causal = False
    exact_budget = True

    group: Group = "sequence"
    """Tokens that are assigned together: those of one `sequence`, or of the whole `batch` as in the paper."""

    def __post_init__(self) -> None:
        if self.group not in get_args(Group):
            raise UserError(f"selection 'base': group must be one of {get_args(Group)}, got {self.group!r}")

    @property
    def k(self) -> int:
        """Experts per token."""
        return 1

    @property
    def batch_invariant(self) -> bool:
        """Only the tokens of one row compete under group `sequence`."""
        return self.group == "sequence"

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)

    def decode_twin(self) -> TopK:
        return TopK(1)

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        groups, num_experts = choice_BSE.shape[0] if self.group == "sequence" else 1, choice_BSE.shape[-1]
        choice_GNE = choice_BSE.detach().reshape(groups, -1, num_experts).double().cpu()
        valid_GN = valid_tokens(allowed_BSE, choice_BSE).reshape(groups, -1).cpu()
        allowed_GNE = None if allowed_BSE is None else allowed_BSE.reshape(choice_GNE.shape).cpu()
        mask_GNE = torch.zeros(choice_GNE.shape, dtype=torch.bool)
        for g in range(groups):
            allowed_NE = None if allowed_GNE is None else allowed_GNE[g][valid_GN[g]]
            mask_GNE[g, valid_GN[g]] = balanced_assignment(choice_GNE[g][valid_GN[g]], allowed_NE)
        mask_TE = mask_GNE.flatten(0, 1).to(choice_BSE.device)
        return Assignment.from_mask(mask_TE, scores_BSE.flatten(0, 1))


def balanced_assignment(gain_NE: Tensor, allowed_NE: Tensor | None = None) -> Tensor:
    """Boolean (N, E) with one expert per token, at most ceil(N / E) tokens per expert and the greatest total gain.

    Args:
        gain_NE: float64 on the CPU; NaN and infinity count as greater than all others.
        allowed_NE: pairs that may be chosen, or None; a token that cannot be placed within them gets nobody.
    """
    from scipy.optimize import linear_sum_assignment  # needed by this rule alone

    tokens, experts = gain_NE.shape
    mask_NE = torch.zeros(tokens, experts, dtype=torch.bool)
    if tokens == 0:
        return mask_NE
    finite_NE = gain_NE.isfinite()
    low, high = (gain_NE[finite_NE].aminmax()) if finite_NE.any() else (gain_NE.new_zeros(()),) * 2
    step = (high - low + 1) * (tokens + 1)  # one pair of this weight outweighs all others together
    gain_NE = torch.where(finite_NE, gain_NE, torch.where(gain_NE == -torch.inf, low - step, high + step))
    if allowed_NE is not None:
        gain_NE = gain_NE.masked_fill(~allowed_NE, float(low - 2 * (tokens + 1) * step))
    places = -(-tokens // experts)
    row_N, place_N = linear_sum_assignment(gain_NE.repeat_interleave(places, dim=1).numpy(), maximize=True)
    mask_NE[torch.from_numpy(row_N), torch.from_numpy(place_N) // places] = True
    return mask_NE if allowed_NE is None else mask_NE & allowed_NE
