"""Selections on the CPU, in C++, where tokens compete: experts or groups of tokens with budgets, and level loads.

As in `bits.py`, callers keep a plain PyTorch path beside it.

Legend: T tokens, E experts, K experts per token, G groups of N tokens.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64
from dataclasses import dataclass

import torch
from torch import Tensor

from crossways.native.bits import Bits, _allowed, _flat, _none, _of_each, _words
from crossways.native.loading import library
from crossways.native.routing import _at, _maybe, _ready, _threads


def of_first_come(
    choice: Tensor, index_TK: Tensor, asked_TK: Tensor | None, capacity_GE: Tensor, by_token: bool
) -> Bits:
    """Of who is among the first `capacity_GE` to ask for an expert, all first choices before second ones or,
    `by_token`, all choices of one token before those of the next; and of whoever asks with a NaN."""
    (choice, *shape), index_TK, asked_TK = _flat(choice), index_TK.contiguous(), _maybe(asked_TK)
    bits, groups = _none(*shape), len(capacity_GE)
    sizes = (groups, len(index_TK) // max(groups, 1), index_TK.shape[1], shape[1], by_token)
    library().crossways_bits_of_first_come(
        _at(choice), _at(index_TK), _at(asked_TK), _at(capacity_GE), *map(c_int64, capacity_GE.stride()),
        *map(c_int64, sizes), _words(bits), _threads(),
    )  # fmt: skip
    return bits


def of_first_best(
    choice: Tensor, k: int, groups: int, capacity: int | Tensor, by_token: bool, allowed: Bits | Tensor | None = None
) -> Bits:
    """The same where every token asks its k greatest allowed experts; `capacity` is one, or int64 (G, E)."""
    (choice, tokens, experts), (capacity_at, steps) = _flat(choice), _budget(capacity, 2)
    allowed, bits = _allowed(allowed), _none(tokens, experts)
    sizes = map(c_int64, (groups, tokens // max(groups, 1), experts, k, by_token))
    library().crossways_bits_of_first_best(
        _at(choice), _words(allowed), capacity_at, *steps, *sizes, _words(bits), _threads()
    )
    return bits


@dataclass(frozen=True)
class Groups:
    """How tokens are grouped: those of group g are g * across, and from there on every along-th, n of them."""

    count: int
    n: int
    across: int
    along: int


def of_shared_budgets(
    choice: Tensor, groups: Groups, budget: int | Tensor, allowed: Bits | Tensor | None = None
) -> Bits:
    """Of the greatest allowed pairs of each group, as many as its budget (one, or int64 (G,)) says; earlier ones of
    equals first, NaN greatest."""
    most = groups.count * min(max(budget, 0), groups.n * choice.shape[-1]) if isinstance(budget, int) else None
    bits = _none(choice.numel() // max(choice.shape[-1], 1), choice.shape[-1], most if allowed is None else None)
    _shared_cuts(choice, groups, budget, _allowed(allowed), bits, None)
    return bits


def least_of_shared(choice: Tensor, groups: Groups, budget: int | Tensor) -> Tensor:
    """Float32 (G,): the least of these, NaN where the budget is 0."""
    least_G = torch.empty(groups.count)
    _shared_cuts(choice, groups, budget, None, None, least_G)
    return least_G


def _shared_cuts(
    choice: Tensor,
    groups: Groups,
    budget: int | Tensor,
    allowed: Bits | None,
    bits: Bits | None,
    least_G: Tensor | None,
) -> None:
    (choice, _, experts), (budget_at, step) = _flat(choice), _budget(budget, 1)
    sizes = map(c_int64, (groups.count, groups.n, groups.across, groups.along, experts))
    library().crossways_shared_cuts(
        _at(choice), _words(allowed), budget_at, *step, *sizes, _words(bits), _at(least_G), _threads()
    )


def _budget(budget: int | Tensor, dims: int) -> tuple[ctypes.c_void_p | ctypes._CArgObject, list[c_int64]]:
    """Where budgets lie, and the steps from one to the next; steps of 0 for one that all have."""
    if isinstance(budget, int):
        return ctypes.byref(c_int64(budget)), [c_int64(0)] * dims
    return _at(budget), [c_int64(step) for step in budget.stride()]


def of_column_budgets(
    choice_GNE: Tensor, budget: int | Tensor, allowed: Bits | Tensor | None = None, broken: bool = False
) -> Bits:
    """Of the greatest allowed entries of each group's columns, as many as their budget (one, or int64 (G, E)) says;
    earlier ones of equals first, NaN greatest. With `broken` every allowed NaN, even beyond the budget."""
    groups, tokens, experts = choice_GNE.shape
    most = None
    if isinstance(budget, int) and allowed is None and not broken:
        most = groups * experts * min(max(budget, 0), tokens)
    bits = _none(groups * tokens, experts, most)
    _column_cuts(choice_GNE, budget, _allowed(allowed), bits, None, broken)
    return bits


def least_of_columns(choice_GNE: Tensor, budget: int | Tensor) -> Tensor:
    """Float32 (G, E): the least of these, NaN where the budget is 0."""
    least_GE = torch.empty(choice_GNE.shape[0], choice_GNE.shape[2])
    _column_cuts(choice_GNE, budget, None, None, least_GE)
    return least_GE


def _column_cuts(
    choice_GNE: Tensor,
    budget: int | Tensor,
    allowed: Bits | None,
    bits: Bits | None,
    least_GE: Tensor | None,
    broken: bool = False,
) -> None:
    choice_GNE, (budget_at, steps) = _ready(choice_GNE, torch.float32), _budget(budget, 2)
    sizes = map(c_int64, (*choice_GNE.shape, broken))
    library().crossways_column_cuts(
        _at(choice_GNE), _words(allowed), budget_at, *steps, *sizes, _words(bits), _at(least_GE), _threads()
    )


def sinkhorn(logits_GNE: Tensor, valid_GN: Tensor | None, most: int, tolerance: float) -> Tensor:
    """What `crossways.rules.select.Sinkhorn.balance` gives, float32 (G, N, E); `valid_GN` None for all."""
    logits_GNE, valid_GN = _ready(logits_GNE, torch.float32), _maybe(valid_GN)
    balanced_GNE = torch.empty_like(logits_GNE)
    sizes = map(c_int64, (*logits_GNE.shape, most))
    library().crossways_sinkhorn(
        _at(logits_GNE), _at(valid_GN), *sizes, c_double(tolerance), _at(balanced_GNE), _threads()
    )
    return balanced_GNE


def of_sinkhorn(
    logits_GNE: Tensor, k: int, most: int, tolerance: float, valid_GN: Tensor | None, allowed: Bits | Tensor | None
) -> Bits:
    """Of each token's k greatest allowed entries of that matrix, which is not written down."""
    logits_GNE, valid_GN = _ready(logits_GNE, torch.float32), _maybe(valid_GN)
    (groups, tokens, experts), allowed = logits_GNE.shape, _allowed(allowed)
    bits = _of_each(k, groups * tokens, experts, allowed)
    library().crossways_bits_of_sinkhorn(
        _at(logits_GNE), _at(valid_GN), _words(allowed), *map(c_int64, (groups, tokens, experts, most)),
        c_double(tolerance), c_int64(k), _words(bits), _threads(),
    )  # fmt: skip
    return bits


def of_balanced(gain: Tensor, groups: int) -> Bits | None:
    """What `routing.balanced` gives for float32 gains and groups of equal size; None if one is not finite."""
    gain, tokens, experts = _flat(gain)
    bits = _none(tokens, experts, tokens)
    starts = (c_int64 * (groups + 1))(*(g * (tokens // max(groups, 1)) for g in range(groups + 1)))
    sizes = c_int64(groups), c_int64(experts)
    solved = library().crossways_bits_of_balanced(_at(gain), starts, *sizes, _words(bits), _threads())
    return bits if solved else None
