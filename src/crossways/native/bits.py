"""Selections on the CPU, in C++: which pairs are chosen, one bit each, and the pairs of such bits.

Here every token chooses for itself; rules where tokens compete are in `budgeted.py`. Callers keep a plain PyTorch
path beside it; where these functions may be used, `crossways.native.routing.fits` says.

Legend: T tokens, E experts, W words of 64 experts, K experts per token, P pairs.
"""

from __future__ import annotations

import math
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass

import torch
from torch import Tensor

from crossways.native.loading import library
from crossways.native.routing import _at, _maybe, _ready, _threads, taken, weights


@dataclass(frozen=True)
class Bits:
    """Chosen pairs, or pairs that may be chosen."""

    word_TW: Tensor
    """int64 (T, W); bit e % 64 of word e // 64 is expert e."""
    experts: int
    """E."""
    most: int | None = None
    """No more pairs than this, and but for odd cases as many; None where they have to be counted."""

    def __or__(self, other: Bits) -> Bits:
        return Bits(self.word_TW | other.word_TW, self.experts)

    def mask(self) -> Tensor:
        """Boolean (T, E)."""
        mask_TE = torch.empty(len(self.word_TW), self.experts, dtype=torch.bool)
        library().crossways_mask_of_bits(_at(self.word_TW), *map(c_int64, mask_TE.shape), _at(mask_TE), _threads())
        return mask_TE


def _none(tokens: int, experts: int, most: int | None = None) -> Bits:
    return Bits(torch.empty(tokens, -(-experts // 64), dtype=torch.int64), experts, most)


def _of_each(k: int, tokens: int, experts: int, allowed: Bits | Tensor | None) -> Bits:
    """Room for k experts of each token, or as many as are allowed."""
    return _none(tokens, experts, min(k, experts) * tokens if allowed is None else None)


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
    bits = _of_each(k, shape[0], shape[1], allowed)
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
    bits = _of_each(min(k, kept * (shape[1] // groups)), shape[0], shape[1], allowed)
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


def pairs(bits: Bits, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens (P,), experts (P,), their entries of `weight` (..., E) and offsets (E + 1,), by expert, then by token.
    Gradients flow back to `weight`."""
    word_TW, experts, native = bits.word_TW, bits.experts, library()
    room = bits.most
    if room is None:
        native.crossways_count_of_bits.restype = c_int64
        room = int(native.crossways_count_of_bits(_at(word_TW), c_int64(word_TW.numel())))
    token_P, expert_P = torch.empty(room, dtype=torch.int64), torch.empty(room, dtype=torch.int64)
    weight_P, offsets_E1 = torch.empty(room), torch.empty(experts + 1, dtype=torch.int64)
    direct = weight.dtype == torch.float32 and weight.is_contiguous()
    native.crossways_pairs.restype = c_int64
    count = native.crossways_pairs(
        _at(word_TW), _at(weight if direct else None), *map(c_int64, (len(word_TW), experts, room)),
        _at(token_P), _at(expert_P), _at(weight_P), _at(offsets_E1), _threads(),
    )  # fmt: skip
    assert count <= room, f"{count} pairs are chosen where {room} were the most"
    if count < room:
        token_P, expert_P, weight_P = token_P[:count], expert_P[:count], weight_P[:count]
    if not direct:
        weight_P = weights(weight.reshape(-1, experts), token_P, expert_P)
    elif weight.requires_grad and torch.is_grad_enabled():
        weight_P = taken(weight, weight_P, token_P, expert_P, word_TW)
    return token_P, expert_P, weight_P, offsets_E1
