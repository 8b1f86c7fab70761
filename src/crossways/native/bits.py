"""Selections on the CPU, in C++: which pairs are chosen, one bit each, and the pairs of such bits.

Callers keep a plain PyTorch path beside it; where these functions may be used, `crossways.native.routing.fits` says.

Legend: T tokens, E experts, W words of 64 experts, K experts per token, P pairs, G groups of N tokens.
"""

from __future__ import annotations

import ctypes
import math
from ctypes import c_double, c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from crossways.native.loading import library
from crossways.native.routing import _at, _maybe, _ready, _threads, taken


@dataclass(frozen=True)
class Bits:
    """Chosen pairs, or pairs that may be chosen."""

    word_TW: Tensor
    """int64 (T, W); bit e % 64 of word e // 64 is expert e."""
    experts: int
    """E."""

    def __or__(self, other: Bits) -> Bits:
        return Bits(self.word_TW | other.word_TW, self.experts)

    def mask(self) -> Tensor:
        """Boolean (T, E)."""
        mask_TE = torch.empty(len(self.word_TW), self.experts, dtype=torch.bool)
        library().crossways_mask_of_bits(_at(self.word_TW), *map(c_int64, mask_TE.shape), _at(mask_TE), _threads())
        return mask_TE


def _none(tokens: int, experts: int) -> Bits:
    return Bits(torch.empty(tokens, -(-experts // 64), dtype=torch.int64), experts)


def _flat(choice: Tensor) -> tuple[Tensor, int, int]:
    """What lies (..., E) as the C++ parts read it, T and E. Nothing is reshaped: where caches are cold, as they are
    after experts, each PyTorch operation takes tens of microseconds."""
    choice, experts = _ready(choice, torch.float32), choice.shape[-1]
    return choice, math.prod(choice.shape[:-1]), experts


def _allowed(allowed: Bits | Tensor | None) -> Bits | None:
    return of_mask(allowed) if isinstance(allowed, Tensor) else allowed


def _words(bits: Bits | None) -> c_void_p:
    return _at(None if bits is None else bits.word_TW)


def of_mask(mask: Tensor) -> Bits:
    """Of a boolean mask (..., E)."""
    mask, experts = mask.contiguous(), mask.shape[-1]
    shape = math.prod(mask.shape[:-1]), experts
    bits = _none(*shape)
    library().crossways_bits_of_mask(_at(mask), *map(c_int64, shape), _words(bits), _threads())
    return bits


def of_index(
    index_TK: Tensor, experts: int, kept_TK: Tensor | None = None, allowed: Bits | Tensor | None = None
) -> Bits:
    """Of each token's experts, all different, but for those that are not kept or not allowed."""
    index_TK, kept_TK, allowed = index_TK.contiguous(), _maybe(kept_TK), _allowed(allowed)
    bits = _none(len(index_TK), experts)
    sizes = map(c_int64, (*index_TK.shape, experts))
    library().crossways_bits_of_index(_at(index_TK), _at(kept_TK), _words(allowed), *sizes, _words(bits), _threads())
    return bits


def of_cutoff(
    choice: Tensor, cutoff: float | Tensor, allowed: Bits | Tensor | None = None, above: bool = False
) -> Bits:
    """Of what is not below its cutoff, one or (E,); with `above`, not at it either. A NaN is taken in any case."""
    (choice, *shape), allowed = _flat(choice), _allowed(allowed)
    bits = _none(*shape)
    cutoff_C = _ready(cutoff, torch.float32) if isinstance(cutoff, Tensor) else torch.tensor([cutoff])
    step = c_int64(cutoff_C.numel() > 1)
    library().crossways_bits_of_cutoff(
        _at(choice), _words(allowed), _at(cutoff_C), step, c_int64(above), *map(c_int64, shape),
        _words(bits), _threads(),
    )  # fmt: skip
    return bits


def of_top_k(choice: Tensor, k: int, allowed: Bits | Tensor | None = None) -> Bits:
    """Of each token's k greatest allowed experts; earlier ones of equals first, NaN greatest."""
    (choice, *shape), allowed = _flat(choice), _allowed(allowed)
    bits = _none(*shape)
    sizes = map(c_int64, (*shape, k))
    library().crossways_bits_of_top_k(_at(choice), _words(allowed), *sizes, _words(bits), _threads())
    return bits


def top_k_index(choice_TE: Tensor, k: int, allowed: Bits | Tensor | None = None) -> Tensor:
    """The same in order, int64 (T, K), greatest first; those that are not allowed come last."""
    choice_TE, allowed = _ready(choice_TE, torch.float32), _allowed(allowed)
    index_TK = torch.empty(len(choice_TE), k, dtype=torch.int64)
    sizes = map(c_int64, (*choice_TE.shape, k))
    library().crossways_top_k(_at(choice_TE), _words(allowed), *sizes, _at(index_TK), _threads())
    return index_TK


def of_group_limited(
    choice: Tensor, k: int, groups: int, best: int, kept: int, allowed: Bits | Tensor | None = None
) -> Bits:
    """The same within each token's `kept` best groups of neighbours, which are ranked by the sum of their `best`
    greatest entries."""
    (choice, *shape), allowed = _flat(choice), _allowed(allowed)
    bits = _none(*shape)
    sizes = map(c_int64, (*shape, k, groups, best, kept))
    library().crossways_bits_of_group_limited(_at(choice), _words(allowed), *sizes, _words(bits), _threads())
    return bits


def of_top_p(choice: Tensor, scores: Tensor, k: int, share: float, allowed: Bits | Tensor | None = None) -> Bits:
    """Of each token's greatest allowed experts until those before hold `share` of its scores, k at most."""
    (choice, *shape), scores = _flat(choice), _ready(scores, torch.float32)
    allowed, bits, sizes = _allowed(allowed), _none(*shape), map(c_int64, (*shape, k))
    library().crossways_bits_of_top_p(
        _at(choice), _at(scores), _words(allowed), *sizes, c_float(share), _words(bits), _threads()
    )
    return bits


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
    bits = _none(choice.numel() // max(choice.shape[-1], 1), choice.shape[-1])
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
    bits = _none(choice_GNE.shape[0] * choice_GNE.shape[1], choice_GNE.shape[2])
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
    bits = _none(groups * tokens, experts)
    library().crossways_bits_of_sinkhorn(
        _at(logits_GNE), _at(valid_GN), _words(allowed), *map(c_int64, (groups, tokens, experts, most)),
        c_double(tolerance), c_int64(k), _words(bits), _threads(),
    )  # fmt: skip
    return bits


def of_balanced(gain: Tensor, groups: int) -> Bits | None:
    """What `routing.balanced` gives for float32 gains and groups of equal size; None if one is not finite."""
    gain, tokens, experts = _flat(gain)
    bits = _none(tokens, experts)
    starts = (c_int64 * (groups + 1))(*(g * (tokens // max(groups, 1)) for g in range(groups + 1)))
    sizes = c_int64(groups), c_int64(experts)
    solved = library().crossways_bits_of_balanced(_at(gain), starts, *sizes, _words(bits), _threads())
    return bits if solved else None


def pairs(bits: Bits, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (P,), experts (P,), their entries of `weight` (..., E) and offsets (E + 1,), by expert, then by token.
    Gradients flow back to `weight`."""
    tokens, parts, native = len(bits.word_TW), torch.get_num_threads(), library()
    offsets_E1 = torch.empty(bits.experts + 1, dtype=torch.int64)
    next_NE = torch.empty(parts, bits.experts, dtype=torch.int64)
    sizes, begins = (c_int64(tokens), c_int64(bits.experts)), (_at(offsets_E1), _at(next_NE), c_int64(parts))
    native.crossways_pair_offsets.restype = c_int64
    count = native.crossways_pair_offsets(_words(bits), *sizes, *begins)
    token_P, expert_P = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
    direct = weight.dtype == torch.float32 and weight.is_contiguous()
    weight_P = torch.empty(count) if direct else None
    native.crossways_pairs(
        _words(bits), _at(weight if direct else None), *sizes, *begins, _at(token_P), _at(expert_P), _at(weight_P)
    )
    if weight_P is None or (weight.requires_grad and torch.is_grad_enabled()):
        weight_P = taken(weight.reshape(-1, bits.experts), token_P, expert_P, weight_P)
    return token_P, expert_P, weight_P, offsets_E1
