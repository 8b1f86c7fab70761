"""Linear-time selection and sorting for routing on the CPU, in C++; callers keep a plain PyTorch path beside it.

Legend: T tokens, P pairs, E experts, K experts per token, G rows of N entries.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from crossways.native.loading import is_loaded, library, why_not_native

_SMALL = 4096


def fits(*tensors: Tensor | None) -> bool:
    """Whether to use these functions: for CPU tensors large enough that it matters, where the C++ parts exist. They
    compare in float32, so not for float64."""
    return solves(*tensors) and all(tensor is None or tensor.dtype != torch.float64 for tensor in tensors)


def solves(*tensors: Tensor | None) -> bool:
    """The same for `balanced`, which computes in float64."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu for tensor in given)
        and max(tensor.numel() for tensor in given) >= _SMALL
        and not torch.compiler.is_compiling()
        and why_not_native() is None
    )


def ready(*tensors: Tensor) -> bool:
    """Whether to use functions that make the same of tensors of any size as PyTorch would: for CPU tensors, where the
    C++ parts are at hand already or `fits` says so. For few tokens they save several small operations."""
    if torch.compiler.is_compiling():
        return False
    return all(type(tensor) is Tensor and tensor.is_cpu for tensor in tensors) if is_loaded() else fits(*tensors)


def _at(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _threads() -> c_int64:
    return c_int64(torch.get_num_threads())


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).contiguous()


def _maybe(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def top_of_rows(choice_GN: Tensor, allowed_GN: Tensor | None, budget_G: Tensor) -> Tensor:
    """Boolean (G, N): each row's `budget_G` greatest allowed entries; earlier ones of equals first, NaN greatest."""
    choice_GN, allowed_GN = _ready(choice_GN, torch.float32), _maybe(allowed_GN)
    budget_G = _ready(budget_G, torch.int64)
    mask_GN = torch.empty(choice_GN.shape, dtype=torch.bool)
    library().crossways_top_of_rows(
        _at(choice_GN), _at(allowed_GN), _at(budget_G), *map(c_int64, choice_GN.shape), _at(mask_GN), _at(None),
        _threads(),
    )  # fmt: skip
    return mask_GN


def least_of_rows(choice_GN: Tensor, budget_G: Tensor) -> Tensor:
    """Float32 (G,): the least of each row's `budget_G` greatest entries, NaN where the budget is 0."""
    choice_GN, budget_G, least_G = _ready(choice_GN, torch.float32), _ready(budget_G, torch.int64), _nan(budget_G)
    library().crossways_top_of_rows(
        _at(choice_GN), _at(None), _at(budget_G), *map(c_int64, choice_GN.shape), _at(None), _at(least_G), _threads()
    )
    return least_G


def top_of_columns(choice_GNE: Tensor, allowed_GNE: Tensor | None, budget_GE: Tensor) -> Tensor:
    """Boolean (G, N, E): as `top_of_rows`, of each group's columns."""
    choice_GNE, allowed_GNE = _ready(choice_GNE, torch.float32), _maybe(allowed_GNE)
    budget_GE, mask_GNE = _ready(budget_GE, torch.int64), torch.empty(choice_GNE.shape, dtype=torch.bool)
    library().crossways_top_of_columns(
        _at(choice_GNE), _at(allowed_GNE), _at(budget_GE), *map(c_int64, choice_GNE.shape), _at(mask_GNE), _at(None),
        _threads(),
    )  # fmt: skip
    return mask_GNE


def least_of_columns(choice_NE: Tensor, budget_E: Tensor) -> Tensor:
    """Float32 (E,): as `least_of_rows`, of columns."""
    choice_NE, budget_E, least_E = _ready(choice_NE, torch.float32), _ready(budget_E, torch.int64), _nan(budget_E)
    library().crossways_top_of_columns(
        _at(choice_NE), _at(None), _at(budget_E), c_int64(1), *map(c_int64, choice_NE.shape), _at(None), _at(least_E),
        _threads(),
    )  # fmt: skip
    return least_E


def _nan(like: Tensor) -> Tensor:
    return torch.full(like.shape, torch.nan)


def top_k(choice_TE: Tensor, k: int, allowed_TE: Tensor | None = None) -> Tensor:
    """Indices of each row's k greatest entries, int64 (T, K), greatest first, earlier ones of equals first; those
    that are not allowed come last."""
    choice_TE, allowed_TE = _ready(choice_TE, torch.float32), _maybe(allowed_TE)
    index_TK = torch.empty(len(choice_TE), k, dtype=torch.int64)
    library().crossways_top_k(
        _at(choice_TE), _at(allowed_TE), *map(c_int64, choice_TE.shape), c_int64(k), _at(index_TK), _threads()
    )
    return index_TK


def within_groups(choice_TE: Tensor, allowed_TE: Tensor | None, groups: int, best: int, kept: int) -> Tensor:
    """Boolean (T, E): the allowed experts of each token's `kept` best groups of neighbours, which are ranked by the
    sum of their `best` greatest entries."""
    choice_TE, allowed_TE = _ready(choice_TE, torch.float32), _maybe(allowed_TE)
    within_TE = torch.empty(choice_TE.shape, dtype=torch.bool)
    tokens, experts = choice_TE.shape
    sizes = map(c_int64, (tokens, groups, experts // groups, best, kept))
    library().crossways_within_groups(_at(choice_TE), _at(allowed_TE), *sizes, _at(within_TE), _threads())
    return within_TE


def first_come(
    choice_TE: Tensor, index_TK: Tensor, asked_TK: Tensor | None, capacity_GE: Tensor, by_token: bool
) -> Tensor:
    """Boolean (T, K): who is among the first `capacity_GE` to ask for an expert, all first choices before second ones
    or, `by_token`, all choices of one token before those of the next; and whoever asks with a NaN."""
    choice_TE, index_TK = _ready(choice_TE, torch.float32), index_TK.contiguous()
    asked_TK, capacity_GE = _maybe(asked_TK), _ready(capacity_GE, torch.int64)
    served_TK = torch.empty(index_TK.shape, dtype=torch.bool)
    groups, (tokens, k), experts = len(capacity_GE), index_TK.shape, choice_TE.shape[1]
    sizes = map(c_int64, (groups, tokens // max(groups, 1), k, experts, by_token))
    library().crossways_first_come(
        _at(choice_TE), _at(index_TK), _at(asked_TK), _at(capacity_GE), *sizes, _at(served_TK), _threads()
    )
    return served_TK


def balanced(gain_NE: Tensor, starts_G1: Tensor) -> Tensor:
    """Int64 (N,): one expert for each token, of a group's n tokens at most ceil(n / E) the same, of the greatest
    total gain there is.

    Args:
        gain_NE: finite.
        starts_G1: first token of each group, and N.
    """
    gain_NE, starts_G1 = _ready(gain_NE, torch.float64), _ready(starts_G1, torch.int64)
    chosen_N = torch.empty(len(gain_NE), dtype=torch.int64)
    sizes = c_int64(len(starts_G1) - 1), c_int64(gain_NE.shape[1])
    library().crossways_balanced(_at(gain_NE), _at(starts_G1), *sizes, _at(chosen_N), _threads())
    return chosen_N


def sort_pairs(expert_P: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """A stable counting sort by expert.

    Returns:
        The pairs' order (P,), their experts in it (P,), and the offsets (E + 1,); int64.

    Raises:
        ValueError: for an expert outside [0, E).
    """
    expert_P = expert_P.to(torch.int64).contiguous()
    order_P, sorted_P = torch.empty_like(expert_P), torch.empty_like(expert_P)
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int64)
    if not library().crossways_sort_pairs(
        _at(expert_P), c_int64(expert_P.numel()), c_int64(num_experts), _at(order_P), _at(sorted_P), _at(offsets_E1)
    ):
        raise ValueError(
            f"experts must lie in [0, {num_experts}), got {int(expert_P.min())} to {int(expert_P.max())}"
        )
    return order_P, sorted_P, offsets_E1


Pairs = tuple[Tensor, Tensor, Tensor]
"""Tokens (P,), experts (P,) and offsets (E + 1,), by expert, then by token; int64."""


def mask_pairs(mask_TE: Tensor) -> Pairs:
    """The pairs of a boolean mask."""
    mask_TE = mask_TE.contiguous()
    (tokens, experts), parts = mask_TE.shape, torch.get_num_threads()
    offsets_E1, next_NE = torch.empty(experts + 1, dtype=torch.int64), torch.empty(parts, experts, dtype=torch.int64)
    shape = _at(mask_TE), c_int64(tokens), c_int64(experts), _at(offsets_E1), _at(next_NE), c_int64(parts)
    native: ctypes.CDLL = library()
    native.crossways_mask_offsets(*shape)
    token_P, expert_P = _room(int(offsets_E1[-1]))
    native.crossways_mask_pairs(*shape, _at(token_P), _at(expert_P))
    return token_P, expert_P, offsets_E1


def index_pairs(
    index_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, allowed_TE: Tensor | None = None
) -> Pairs:
    """The pairs of each token's experts, all different, but for those that are not kept or not allowed."""
    index_TK, kept_TK, allowed_TE = index_TK.contiguous(), _maybe(kept_TK), _maybe(allowed_TE)
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int64)
    token_P, expert_P = _room(index_TK.numel())
    sizes = map(c_int64, (*index_TK.shape, num_experts))
    library().crossways_index_pairs(
        _at(index_TK), _at(kept_TK), _at(allowed_TE), *sizes, _at(token_P), _at(expert_P), _at(offsets_E1), _threads()
    )
    pairs = int(offsets_E1[-1])
    return token_P[:pairs], expert_P[:pairs], offsets_E1


def _room(pairs: int) -> tuple[Tensor, Tensor]:
    return torch.empty(pairs, dtype=torch.int64), torch.empty(pairs, dtype=torch.int64)


def weights(matrix_TE: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
    """matrix_TE[token_P, expert_P], where no two pairs are the same. Differentiable, any number of times."""
    if not fits(matrix_TE) or matrix_TE.dtype != torch.float32:
        return matrix_TE[token_P, expert_P]
    taken: Tensor = _Take.apply(matrix_TE, token_P, expert_P)
    return taken


class _Take(torch.autograd.Function):
    """The pairs' entries of a matrix. Its gradient is a matrix, written once; that of indexing is added up."""

    @staticmethod
    def forward(ctx: Any, matrix_TE: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
        ctx.save_for_backward(token_P, expert_P)
        ctx.shape = matrix_TE.shape
        matrix_TE, out_P = matrix_TE.contiguous(), torch.empty(len(token_P))
        sizes = c_int64(len(token_P)), c_int64(matrix_TE.shape[1])
        library().crossways_take(_at(matrix_TE), _at(token_P), _at(expert_P), *sizes, _at(out_P), _threads())
        return out_P

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None, None]:
        return _Put.apply(grad_P, *ctx.saved_tensors, *ctx.shape), None, None


class _Put(torch.autograd.Function):
    """The other way round."""

    @staticmethod
    def forward(ctx: Any, value_P: Tensor, token_P: Tensor, expert_P: Tensor, tokens: int, experts: int) -> Tensor:
        ctx.save_for_backward(token_P, expert_P)
        value_P, out_TE = value_P.contiguous(), torch.empty(tokens, experts)
        sizes = map(c_int64, (len(token_P), tokens, experts))
        library().crossways_put(_at(value_P), _at(token_P), _at(expert_P), *sizes, _at(out_TE), _threads())
        return out_TE

    @staticmethod
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Take.apply(grad_TE, *ctx.saved_tensors), None, None, None, None
