"""BASE: the balanced assignment of tokens to experts with the greatest total affinity.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group, C = places per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import budgeted, routing
from crossways.rules.select.base import Selection, check_budget, valid_tokens
from crossways.rules.select.top_k import TopK

Group = Literal["sequence", "batch"]


@dataclass(frozen=True)
class Base(Selection):
    """One expert for each token, maximising the total of the logits subject to equal loads (BASE layers, Lewis et al.
    2021, arXiv 2103.16716, section 3.2.1, eq. 2: a linear assignment problem).

    Where n tokens do not divide by E experts, each takes at most ceil(n / E). Chooses by the logits h w_e and weighs
    by the score, which is `sigmoid` in the paper (eq. 1). Every token's place depends on all others; the decode twin
    is the greedy choice that the paper uses for evaluation (section 3.2.2). Solved exactly, on the CPU: where the C++
    parts run by shortest chains of moves between experts, else by scipy, hundreds of times slower. (The paper's
    auction finds the same optimum only when its bids are raised by very little.)
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

    @torch.compiler.disable(reason="the selection base solves its assignment problem on the CPU")
    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        groups = choice_BSE.shape[0] if self.group == "sequence" else 1
        if allowed_BSE is None and routing.fits(choice_BSE):
            chosen = budgeted.of_balanced(choice_BSE, groups)
            if chosen is not None:
                return Assignment.from_bits(chosen, scores_BSE)
        if allowed_BSE is None:
            tokens = choice_BSE.shape[0] * choice_BSE.shape[1]
            starts_G1 = torch.arange(groups + 1) * (tokens // max(groups, 1))
            index_T = balanced_experts(choice_BSE.detach().flatten(0, 1).cpu(), starts_G1)
            return Assignment.from_choices(index_T[:, None].to(choice_BSE.device), scores_BSE.flatten(0, 1))
        valid_T = valid_tokens(allowed_BSE, choice_BSE).flatten().cpu()
        starts_G1 = functional.pad(valid_T.view(groups, -1).sum(-1).cumsum(0), (1, 0))
        gain_TE = choice_BSE.detach().flatten(0, 1).cpu()
        allowed_TE = allowed_BSE.flatten(0, 1).cpu()
        index_T = torch.zeros(len(valid_T), dtype=torch.int64)
        index_T[valid_T] = balanced_experts(gain_TE[valid_T], starts_G1, allowed_TE[valid_T])
        index_T1 = index_T[:, None].to(choice_BSE.device)
        return Assignment.from_choices(index_T1, scores_BSE.flatten(0, 1), allowed_TE=allowed_BSE.flatten(0, 1))


def balanced_experts(gain_NE: Tensor, starts_G1: Tensor, allowed_NE: Tensor | None = None) -> Tensor:
    """One expert per token, at most ceil(n / E) of the n tokens of a group per expert, of the greatest total gain.

    Args:
        gain_NE: floating point, on the CPU; NaN and infinity count as greater than all others.
        starts_G1: int64, first token of each group, and N.
        allowed_NE: pairs that may be chosen, or None; a token that cannot be placed within them gets another.

    Returns:
        int64 (N,).
    """
    native = routing.solves(gain_NE)
    if native and allowed_NE is None and (index_N := routing.balanced(gain_NE, starts_G1)) is not None:
        return index_N
    gain_NE = _finite(gain_NE.double(), allowed_NE)
    if native and (index_N := routing.balanced(gain_NE, starts_G1)) is not None:
        return index_N
    groups = [gain_NE[first:end] for first, end in pairwise(starts_G1.tolist())]
    return torch.cat([_solved(group_NE) for group_NE in groups] or [starts_G1[:0]])


def balanced_assignment(gain_NE: Tensor, allowed_NE: Tensor | None = None) -> Tensor:
    """Boolean (N, E): the same for one group; a token that cannot be placed within what is allowed gets nobody."""
    index_N = balanced_experts(gain_NE, torch.tensor([0, len(gain_NE)]), allowed_NE)
    mask_NE = torch.zeros(gain_NE.shape, dtype=torch.bool).scatter_(1, index_N[:, None], True)
    return mask_NE if allowed_NE is None else mask_NE & allowed_NE


def _finite(gain_NE: Tensor, allowed_NE: Tensor | None) -> Tensor:
    """The same without infinities and NaN, and with what is not allowed below all else."""
    finite_NE = gain_NE.isfinite()
    everything = bool(finite_NE.all())
    if everything and allowed_NE is None:
        return gain_NE
    known = gain_NE if everything else gain_NE[finite_NE]
    low, high = known.aminmax() if known.numel() else (gain_NE.new_zeros(()),) * 2
    step = (high - low + 1) * (len(gain_NE) + 1)  # one pair of this weight outweighs all others together
    gain_NE = torch.where(finite_NE, gain_NE, torch.where(gain_NE == -torch.inf, low - step, high + step))
    if allowed_NE is None:
        return gain_NE
    return gain_NE.masked_fill(~allowed_NE, float(low - 2 * (len(gain_NE) + 1) * step))


def _solved(gain_NE: Tensor) -> Tensor:
    """One group, by scipy: an expert is as many columns as it has places."""
    from scipy.optimize import linear_sum_assignment  # needed by this rule alone

    tokens, experts = gain_NE.shape
    places = -(-tokens // experts)
    _, place_N = linear_sum_assignment(gain_NE.repeat_interleave(places, dim=1).numpy(), maximize=True)
    return torch.from_numpy(place_N) // max(places, 1)
