"""Token choice with a capacity: an expert that is full drops the tokens that come later. Switch, GShard and MoE++.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group, K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import bits, budgeted, routing
from crossways.rules.select.base import (
    Count,
    Selection,
    check_budget,
    check_number,
    check_whole,
    place_in_queue,
    top_k_index,
    top_of_columns,
)

Group = Literal["sequence", "batch"]
Order = Literal["position", "score", "weight", "token"]
Second = Literal["always", "random"]


@dataclass(frozen=True)
class Capacity(Selection):
    """Each token asks for its k best experts; each expert serves at most C = ceil(factor * k * n / E) tokens of its
    group of n and drops the rest, which pass through the residual.

    Switch Transformers (arXiv 2101.03961, eq. 3) is k = 1, raw softmax weights; GShard (arXiv 2006.16668, section
    2.2 and algorithm 1) is k = 2 with `normalize` and `second = random`. First choices are served before second ones,
    and among them earlier positions first (rows of a batch one after the other), or greater scores first. A second
    choice that chance leaves out takes no place in the queue, as in fairseq's GShard; in the algorithm as printed it
    does.

    Nothing but C makes the order of service by position and k = 1 look ahead, and that is enough: C grows with the
    number of tokens, so a token that is dropped in a prefix may be served in the whole text. No finite factor is
    declared causal, though one of at least E / k drops nobody. Generation has no full experts: the decode twin is the
    same rule without a limit, which is top-k.

    MoE++ (arXiv 2410.07348, eq. 8) gives the experts that
    compute nothing, which come last, more places: with N_F feed-forward experts and N_Z others C is factor * k * n /
    (tau N_F + N_Z) for the others, and tau <= 1 times that for feed-forward experts. The paper writes T for what is
    to be placed; we read it as the k n choices of n tokens, or half of them would have no place.
    """

    name: ClassVar[str] = "capacity"

    k: int = 1
    """Experts a token asks for, 1 to E; 1 in Switch, 2 in GShard."""
    factor: float | None = 1.25
    """Capacity over the load of perfect balance, above 0; 1 to 2 in the papers (Switch trains with 1 to 1.25). None
    drops nobody."""
    group: Group = "sequence"
    """Tokens that compete for places: those of one `sequence`, or of the whole `batch` as in the papers."""
    order: Order = "position"
    """Who is served first by a full expert: first choices and among them earlier tokens (`position`, the papers'),
    greater scores (`score`), greater weights after `normalize` (`weight`), or earlier tokens whichever choice it is
    of theirs (`token`); the last two are the policies `probs` and `position` of Megatron-core."""
    normalize: bool = False
    """Scale each token's k weights to sum to one before any is dropped (GShard). `renormalize` does so afterwards."""
    second: Second = "always"
    """`random`: in training, an expert after the first is asked with probability min(1, k * its normalised weight)
    (GShard, for k = 2: twice the weight); evaluation always asks."""
    zero_computation: int = 0
    """How many experts, the last ones, compute nothing: the model's zero, copy and constant experts together."""
    tau: float = 1.0
    """Places of a feed-forward expert in units of those of one that computes nothing, above 0; 0.75 in MoE++."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", check_whole(self.name, "k", self.k))
        if self.factor is not None:
            check_number(self.name, "factor", self.factor)
            if not 0 < self.factor < math.inf:
                raise UserError(f"selection 'capacity': factor must be a finite number above 0, got {self.factor}")
        check_number(self.name, "zero_computation", self.zero_computation)
        if self.zero_computation < 0 or self.zero_computation % 1 != 0:
            raise UserError(
                "selection 'capacity': zero_computation must be a whole number of at least 0, "
                f"got {self.zero_computation}"
            )
        object.__setattr__(self, "zero_computation", int(self.zero_computation))
        check_number(self.name, "tau", self.tau)
        if not 0 < self.tau < math.inf:
            raise UserError(f"selection 'capacity': tau must be a finite number above 0, got {self.tau}")
        for field, known in (("group", Group), ("order", Order), ("second", Second)):
            if (value := getattr(self, field)) not in get_args(known):
                raise UserError(f"selection 'capacity': {field} must be one of {get_args(known)}, got {value!r}")

    @property
    def causal(self) -> bool:
        """Not with a limit: see above."""
        return self.factor is None

    @property
    def batch_invariant(self) -> bool:
        """Only the tokens of one row compete under group `sequence`."""
        return self.factor is None or self.group == "sequence"

    @property
    def exact_budget(self) -> bool:
        """How many are dropped depends on who asks for whom."""
        return self.factor is None

    def check(self, num_experts: int) -> None:
        check_budget(self.name, self.k, num_experts)
        if self.zero_computation > num_experts:
            raise UserError(
                f"selection 'capacity': zero_computation = {self.zero_computation} exceeds the {num_experts} experts"
            )

    def decode_twin(self) -> Capacity:
        return self if self.factor is None else self._as(Capacity, None)

    def asking(self) -> Capacity | None:
        return None if self.factor is None else self.decode_twin()

    def in_training(self) -> Capacity:
        if self.second == "always":
            return self
        return self._as(_Sampled, self.factor)

    def _as(self, kind: type[Capacity], factor: float | None) -> Capacity:
        """Field by field, which the compiler can follow."""
        return kind(
            self.k, factor, self.group, self.order, self.normalize, self.second, self.zero_computation, self.tau
        )

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        if self._asks_its_best() and routing.fits(choice_BSE, allowed_BSE):
            return Assignment.from_bits(self._best_bits(choice_BSE, allowed_BSE), scores_BSE)
        batch, _, num_experts = choice_BSE.shape
        choice_TE = choice_BSE.flatten(0, 1)
        index_TK, asked_TK, weight_TE = self._asked(choice_TE, scores_BSE.flatten(0, 1), allowed_BSE)
        groups = batch if self.group == "sequence" else 1
        tokens_G = torch.full((groups,), len(choice_TE) // max(groups, 1), device=choice_TE.device)
        if allowed_BSE is not None:
            tokens_G = allowed_BSE.any(-1).reshape(groups, -1).sum(-1)
        ranked_TE = weight_TE.detach() if self.order == "weight" else choice_TE
        capacity_GE = self.capacity(tokens_G, num_experts)
        if routing.fits(choice_TE, ranked_TE):
            served = self._bits(choice_TE, index_TK, asked_TK, ranked_TE, capacity_GE)
            return Assignment.from_bits(served, weight_TE)
        asked_TK = torch.ones_like(index_TK, dtype=torch.bool) if asked_TK is None else asked_TK
        served_TK = self._served(index_TK, asked_TK, ranked_TE, capacity_GE)
        served_TK = served_TK | (asked_TK & choice_TE.gather(-1, index_TK).isnan())  # must show: is not dropped
        return Assignment.from_choices(index_TK, weight_TE, served_TK)

    def _asks_its_best(self) -> bool:
        """Whether who is served follows from the choice alone: every token asks for its k best, at its raw scores."""
        return not self.normalize and self.order != "weight"

    def _best_bits(self, choice_BSE: Tensor, allowed_BSE: Tensor | None) -> bits.Bits:
        """Who is then served, in C++, without as much as writing down who is asked."""
        if self.factor is None:
            return bits.of_top_k(choice_BSE, self.k, allowed_BSE)
        batch, tokens, num_experts = choice_BSE.shape
        groups, tokens = (batch, tokens) if self.group == "sequence" else (1, batch * tokens)
        capacity: int | Tensor
        if allowed_BSE is None and not self.zero_computation:
            capacity = _ceil(self._shares(num_experts)[0], tokens)
        else:
            tokens_G = torch.full((groups,), tokens)
            if allowed_BSE is not None:
                tokens_G = allowed_BSE.any(-1).reshape(groups, -1).sum(-1)
            capacity = self.capacity(tokens_G, num_experts)
        if self.order in ("position", "token"):
            by_token = self.order == "token"
            return budgeted.of_first_best(choice_BSE, self.k, groups, capacity, by_token, allowed_BSE)
        asked = bits.of_top_k(choice_BSE, self.k, allowed_BSE)
        choice_GNE = choice_BSE.reshape(groups, tokens, num_experts)
        return budgeted.of_column_budgets(choice_GNE, capacity, asked, broken=True)

    def _bits(
        self,
        choice_TE: Tensor,
        index_TK: Tensor,
        asked_TK: Tensor | None,
        ranked_TE: Tensor,
        capacity_GE: Tensor,
    ) -> bits.Bits:
        """The same in C++."""
        if self.order in ("position", "token"):
            return budgeted.of_first_come(choice_TE, index_TK, asked_TK, capacity_GE, self.order == "token")
        groups, num_experts = capacity_GE.shape
        asked = bits.of_index(index_TK, num_experts, asked_TK)
        broken = bits.of_cutoff(choice_TE, math.inf, asked, above=True)
        return budgeted.of_column_budgets(ranked_TE.view(groups, -1, num_experts), capacity_GE, asked) | broken

    def capacity(self, tokens_G: Tensor, num_experts: int) -> Tensor:
        """Places at each of E experts, int64 (G, E), in groups of so many tokens, int64 (G,). In integers."""
        if self.factor is None:
            return tokens_G[:, None].expand(-1, num_experts)
        shares = self._shares(num_experts)
        if not self.zero_computation:
            return _ceil(shares[0], tokens_G)[:, None].expand(-1, num_experts)
        places = {share: _ceil(share, tokens_G) for share in set(shares)}  # two at most
        return torch.stack([places[share] for share in shares], -1)

    def _shares(self, num_experts: int) -> list[Fraction]:
        """Places of each expert for one token."""
        feed_forward = num_experts - self.zero_computation
        rates = _rates.__wrapped__ if torch.compiler.is_compiling() else _rates  # the compiler warns of caches
        share, other = rates(self.k, self.factor or 0, self.tau, feed_forward, self.zero_computation)
        return [share] * feed_forward + [other] * self.zero_computation

    def _asked(
        self, choice_TE: Tensor, scores_TE: Tensor, allowed_BSE: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Each token's first, second, ... choice and whether it asks for it (None: for all), both (T, K); and the
        weights (T, E)."""
        allowed_TE = None if allowed_BSE is None else allowed_BSE.flatten(0, 1)
        index_TK = top_k_index(choice_TE, self.k, allowed_TE)
        asked_TK = None if allowed_TE is None else allowed_TE.gather(-1, index_TK)
        if self.normalize:
            asked_weight_TK = scores_TE.gather(-1, index_TK)
            sum_T1 = (asked_weight_TK if asked_TK is None else asked_weight_TK * asked_TK).sum(-1, keepdim=True)
            scores_TE = scores_TE / torch.where(sum_T1 > 0, sum_T1, 1.0)
        return index_TK, self._sample(index_TK, asked_TK, scores_TE), scores_TE

    def _sample(self, index_TK: Tensor, asked_TK: Tensor | None, weight_TE: Tensor) -> Tensor | None:
        return asked_TK

    def _served(self, index_TK: Tensor, asked_TK: Tensor, ranked_TE: Tensor, capacity_GE: Tensor) -> Tensor:
        """Boolean (T, K): who gets a place."""
        groups, num_experts = capacity_GE.shape
        if self.order in ("position", "token"):
            return self._first_come(index_TK.view(groups, -1, self.k), asked_TK.view(groups, -1, self.k), capacity_GE)
        tokens = len(index_TK) // max(groups, 1)
        asked_TE = _mark(index_TK, asked_TK, num_experts)
        shape = groups, tokens, num_experts
        most = tokens if self.factor is None else max(_ceil(share, tokens) for share in self._shares(num_experts))
        best_GNE = top_of_columns(ranked_TE.view(shape), asked_TE.view(shape), capacity_GE, most)
        return asked_TK & best_GNE.reshape(ranked_TE.shape).gather(-1, index_TK)

    def _first_come(self, index_GNK: Tensor, asked_GNK: Tensor, capacity_GE: Tensor) -> Tensor:
        """Who is among the first in the queue of each expert: all first choices by position, then all second ones;
        or, with order `token`, all choices of one token before those of the next."""
        num_queues = capacity_GE.numel()
        first_G11 = torch.arange(0, num_queues, capacity_GE.shape[1], device=index_GNK.device)[:, None, None]
        queue_GNK = (index_GNK + first_G11).masked_fill(~asked_GNK, num_queues)  # those that do not ask wait apart
        queue_GQ = queue_GNK if self.order == "token" else queue_GNK.transpose(1, 2)
        place_GQ = place_in_queue(queue_GQ.flatten(), num_queues + 1).view(queue_GQ.shape)
        place_GNK = place_GQ if self.order == "token" else place_GQ.transpose(1, 2)
        places_GNK = functional.pad(capacity_GE.flatten(), (0, 1))[queue_GNK]
        return (asked_GNK & (place_GNK < places_GNK)).flatten(0, 1)


def _mark(index_TK: Tensor, marked_TK: Tensor, num_experts: int) -> Tensor:
    """Boolean (T, E), true at the marked indices."""
    mask_TE = torch.zeros(len(index_TK), num_experts, dtype=torch.bool, device=index_TK.device)
    return mask_TE.scatter(-1, index_TK, marked_TK)


@cache
def _rates(k: int, factor: float, tau: float, feed_forward: int, others: int) -> tuple[Fraction, Fraction]:
    """Places of an expert of either kind for one token. Kept: fractions are slow, and asked for in every decision."""
    exact = Fraction(tau).limit_denominator(10**6)
    rate = Fraction(factor).limit_denominator(10**6) * k / (exact * feed_forward + others)
    return rate * exact, rate


def _ceil(share: Fraction, tokens: Count) -> Count:
    """share * tokens, rounded up."""
    return -(-share.numerator * tokens // share.denominator)


class _Sampled(Capacity):
    """The rule with `second = random` in training: weak further choices are often not asked for."""

    def _asks_its_best(self) -> bool:
        return False

    def _sample(self, index_TK: Tensor, asked_TK: Tensor | None, weight_TE: Tensor) -> Tensor:
        asked_TK = torch.ones_like(index_TK, dtype=torch.bool) if asked_TK is None else asked_TK
        asked_weight_TK = asked_TK * weight_TE.detach().gather(-1, index_TK)
        share_TK = asked_weight_TK / asked_weight_TK.sum(-1, keepdim=True)
        keep_TK = torch.rand_like(share_TK) < self.k * share_TK
        keep_TK[:, 0] = True
        return asked_TK & keep_TK
