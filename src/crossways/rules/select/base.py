"""The contract of a selection.

Legend: B batch, S sequence, E experts, T = B * S tokens (row-major), G groups, N members of a group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.native import bits, budgeted, routing
from crossways.rules.registry import build, catalogue
from crossways.rules.value import Value


@dataclass(frozen=True)
class Selection(Value):
    """Chooses pairs by `choice_BSE` and gives them the weights in `scores_BSE`.

    The two are the same tensor for most rules; they differ where a rule chooses by a biased score and weighs by the
    unbiased one. Every rule declares the three properties below, and `crossways.rules.probe` holds it to them.

    A score that is not a number counts as greater than all others, so its pair is chosen and its weight makes the
    token's output NaN: a broken gate shows in the loss instead of silently dropping tokens.
    """

    name: ClassVar[str]
    """What selects the rule in a configuration."""
    scheduled: ClassVar[bool] = False
    """Whether the rule changes in the course of training, so that the model must count its steps."""
    chooses_by: ClassVar[Literal["scores", "logits"]] = "scores"
    """What the router hands over as `choice_BSE`: most papers rank scores; a few solve a problem in the logits."""

    @property
    def causal(self) -> bool:
        """A later token never changes an earlier token's experts."""
        raise NotImplementedError

    @property
    def batch_invariant(self) -> bool:
        """Another row of the batch, padding included, never changes mine."""
        raise NotImplementedError

    @property
    def exact_budget(self) -> bool:
        """The number of chosen pairs follows from which tokens are valid alone, not from their content."""
        raise NotImplementedError

    def __call__(self, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Assignment:
        """Choose pairs.

        Args:
            choice_BSE: float32 or float64 (B, S, E), greater is better, above minus infinity wherever the pair is
                allowed.
            scores_BSE: the same (B, S, E), the weights of the chosen pairs; gradients flow through these.
            allowed_BSE: boolean (B, S, E), false for pairs that must not be chosen (padding, disabled experts);
                None allows all.
        """
        raise NotImplementedError

    def check(self, num_experts: int) -> None:
        """Raise `UserError` if the rule cannot work with this many experts."""

    def at_step(self, step: int) -> Selection:
        """The rule after so many steps of training; itself unless it is scheduled."""
        return self

    def decode_twin(self) -> Selection:
        """The causal, batch-invariant rule to generate with: the rule itself if it is both, else a threshold."""
        return self

    def in_training(self) -> Selection:
        """The rule to use while the router trains: itself, unless it samples there. Samples come from torch's
        generator, so gradient checkpointing repeats them."""
        return self

    def asking(self) -> Selection | None:
        """The rule without dropping anybody, for balancing losses that count who was asked for; None if it drops
        nobody."""
        return None

    def cutoff(self, choice_BSE: Tensor, allowed_BSE: Tensor | None = None) -> Tensor | None:
        """The threshold, (1,) or (E,), that would have spent the same budget on this batch; None if the rule and
        its decode twin need none."""
        return None


def selection_catalogue() -> dict[str, type[Selection]]:
    """Every selection by name."""
    return catalogue(Selection, "crossways.rules.select")


def build_selection(spec: str | Mapping[str, Any]) -> Selection:
    """A selection from its name or its fields; raises `UserError` for an unknown one."""
    return build(Selection, spec, selection_catalogue())


def check_number(rule: str, field: str, value: Any) -> None:
    """Raise `UserError` unless the field holds a number; JSON and YAML also give texts and booleans."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"selection {rule!r}: {field} must be a number, got {value!r}")


def check_whole(rule: str, field: str, value: Any) -> int:
    """The field's value as an int (2.0 in a recipe means 2); raises `UserError` unless it is whole and positive."""
    check_number(rule, field, value)
    if not value >= 1 or value % 1 != 0:
        raise UserError(f"selection {rule!r}: {field} must be a whole number of at least 1, got {value}")
    return int(value)


def check_budget(rule: str, k: float, num_experts: int) -> None:
    """Raise `UserError` unless 0 < k <= E."""
    check_number(rule, "k", k)
    if not 0 < k <= num_experts:
        raise UserError(
            f"selection {rule!r}: k must lie in (0, number of experts], got k = {k} with {num_experts} experts"
        )


def whole(budget: float) -> int:
    """A fractional number of pairs rounded half up, so that budgets grow with k without banker's jumps."""
    return math.floor(budget + 0.5)


Count = TypeVar("Count", Tensor, int)


def budgets(tokens_G: Count, k: float, experts: int = 1) -> Count:
    """Pairs that groups of `tokens_G` tokens may spend at k a token, shared by `experts` experts, rounded half up.

    In integers: float32, and a k such as 0.1 in any binary float, would be off by one in large groups.

    Args:
        tokens_G: int64 (G,), valid tokens of each group; or an int, for one group whose size is known.
        k: mean experts per token; taken as a fraction with a denominator of at most a million.
        experts: among how many equal shares the budget is divided.

    Returns:
        int64 (G,), or an int.
    """
    rate = _rate.__wrapped__ if torch.compiler.is_compiling() else _rate  # the compiler warns of caches
    above, below = rate(k, experts)
    return (2 * above * tokens_G + below) // (2 * below)


@cache
def _rate(k: float, experts: int) -> tuple[int, int]:
    """k / experts as a fraction; kept, as fractions are slow and every decision asks for one."""
    rate = Fraction(k).limit_denominator(10**6) / experts
    return rate.numerator, rate.denominator


def top_of_groups(choice_GN: Tensor, allowed_GN: Tensor | None, budget_G: Tensor, most: int) -> Tensor:
    """Mark the `budget_G[g]` greatest allowed entries of each row.

    Args:
        choice_GN: floating point (G, N).
        allowed_GN: boolean (G, N) or None.
        budget_G: int64 (G,), how many to take; more than are allowed takes all allowed.
        most: the greatest budget there may be; given, because reading it would wait for the device.

    Returns:
        Boolean (G, N). Of equal entries the first are taken: equal tokens have equal scores (a text that begins with
        the same word twice), and what `topk` makes of ties changes with the width of the row, so with padding. A NaN
        counts as the greatest.
    """
    if routing.fits(choice_GN):
        return budgeted.of_shared_budgets(
            choice_GN, budgeted.Groups(len(choice_GN), 1, 1, 1), budget_G, allowed_GN
        ).mask()
    most = min(most, choice_GN.shape[1])
    if most == 0:
        return torch.zeros_like(choice_GN, dtype=torch.bool)
    choice_GN = choice_GN.detach().nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if allowed_GN is not None:
        choice_GN = choice_GN.masked_fill(~allowed_GN, -torch.inf)
    best_GM = choice_GN.topk(most, dim=-1).values
    least_G1 = best_GM.gather(1, (budget_G[:, None] - 1).clamp(0, most - 1))
    above_GN, equal_GN = choice_GN > least_G1, choice_GN == least_G1
    if allowed_GN is not None:
        above_GN, equal_GN = above_GN & allowed_GN, equal_GN & allowed_GN
    left_G1 = budget_G[:, None].clamp(max=most) - above_GN.sum(1, keepdim=True)
    return (above_GN | (equal_GN & (equal_GN.cumsum(1, dtype=torch.int32) <= left_G1))) & (budget_G > 0)[:, None]


def top_of_columns(choice_GNE: Tensor, allowed_GNE: Tensor | None, budget_GE: Tensor, most: int) -> Tensor:
    """The same for the columns of each group: boolean (G, N, E), of budgets (G, E)."""
    if routing.fits(choice_GNE, allowed_GNE):
        return budgeted.of_column_budgets(choice_GNE, budget_GE, allowed_GNE).mask().view(choice_GNE.shape)
    groups, tokens, num_experts = choice_GNE.shape
    choice_GN = choice_GNE.transpose(1, 2).flatten(0, 1)
    allowed_GN = None if allowed_GNE is None else allowed_GNE.transpose(1, 2).flatten(0, 1)
    mask_GN = top_of_groups(choice_GN, allowed_GN, budget_GE.flatten(), most)
    return mask_GN.view(groups, num_experts, tokens).transpose(1, 2)


def top_k_index(choice_TE: Tensor, k: int, allowed_TE: Tensor | None = None) -> Tensor:
    """Indices of each token's k greatest allowed entries, int64 (T, K), greatest first; where fewer are allowed, the
    last ones are anything."""
    if routing.fits(choice_TE, allowed_TE):
        return bits.top_k_index(choice_TE, k, allowed_TE)
    if allowed_TE is not None:
        choice_TE = choice_TE.masked_fill(~allowed_TE, -torch.inf)
    return choice_TE.topk(k, dim=-1).indices


def place_in_queue(queue_Q: Tensor, num_queues: int) -> Tensor:
    """How many earlier entries of `queue_Q`, int64 (Q,) in [0, `num_queues`), are the same; int64 (Q,)."""
    if routing.fits(queue_Q):
        order_Q, sorted_Q, starts_N = routing.sort_pairs(queue_Q, num_queues)
    else:
        sorted_Q, order_Q = torch.sort(queue_Q, stable=True)
        starts_N = torch.searchsorted(sorted_Q, torch.arange(num_queues, device=queue_Q.device))
    place_Q = torch.arange(len(queue_Q), device=queue_Q.device) - starts_N[sorted_Q]
    return torch.empty_like(place_Q).scatter_(0, order_Q, place_Q)


def valid_tokens(allowed_BSE: Tensor | None, choice_BSE: Tensor) -> Tensor:
    """Boolean (B, S): tokens that may choose at least one expert. All of them when `allowed_BSE` is None."""
    if allowed_BSE is None:
        return torch.ones(choice_BSE.shape[:2], dtype=torch.bool, device=choice_BSE.device)
    return allowed_BSE.any(-1)
