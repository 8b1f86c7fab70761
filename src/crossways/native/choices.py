"""Each token's choices as pairs in the order of their experts, on the CPU, in one call: in a step of generation every
small operation of PyTorch's counts. `Assignment.from_topk` and `crossways.rectangle` keep plain PyTorch paths beside.

Legend: T tokens, K experts per token, P pairs, T K if no place is empty, E experts.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int64, c_void_p
from functools import cache

import torch
from torch import Tensor

from crossways.native.loading import library
from crossways.native.watched import is_watched


def sorted_choices(
    index_TK: Tensor, weight_TK: Tensor, num_experts: int, *, empty: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stable sort by expert.

    Args:
        index_TK: integers (T, K), where `routing.ready` says that the C++ parts may read them.
        weight_TK: floating point (T, K); gradients flow through it.
        num_experts: E.
        empty: whether E and more mean that a place is empty.

    Returns:
        The pairs' tokens, experts, weights (P,), and the offsets (E + 1,); int64 but for the weights.

    Raises:
        ValueError: for an expert outside [0, E), or with `empty` below 0.
    """
    tokens, k = index_TK.shape
    if index_TK.dtype != torch.int64 or not index_TK.is_contiguous():
        index_TK = index_TK.to(torch.int64).contiguous()
    most = tokens * k
    token_P = torch.empty(most, dtype=torch.int64)
    expert_P = torch.empty(most, dtype=torch.int64)
    offsets_E1 = torch.empty(num_experts + 1, dtype=torch.int64)
    plain = _is_plain(index_TK, weight_TK)
    moved_P = torch.empty(most, dtype=weight_TK.dtype if plain else torch.int64)  # weights, or the places of pairs
    count = _sort(library())(
        index_TK.data_ptr(), weight_TK.data_ptr() if plain else None, tokens, k, num_experts, not empty,
        weight_TK.element_size(), token_P.data_ptr(), expert_P.data_ptr(), moved_P.data_ptr(), offsets_E1.data_ptr(),
    )  # fmt: skip
    if count < 0:
        limits = "not be negative" if empty else f"lie in [0, {num_experts})"
        raise ValueError(f"experts must {limits}, got {int(index_TK.min())} to {int(index_TK.max())}")
    if count < most:
        token_P, expert_P, moved_P = token_P[:count], expert_P[:count], moved_P[:count]
    return token_P, expert_P, moved_P if plain else weight_TK.take(moved_P), offsets_E1


def _is_plain(index_TK: Tensor, weight_TK: Tensor) -> bool:
    """Whether the weights are moved as they are, with nobody who wants to know how."""
    return (
        not (torch.is_grad_enabled() and weight_TK.requires_grad)
        and not is_watched(weight_TK)
        and weight_TK.is_cpu
        and weight_TK.shape == index_TK.shape
        and weight_TK.is_contiguous()
        and weight_TK.element_size() in (2, 4)
    )


@cache
def _sort(parts: ctypes.CDLL) -> Callable[..., int]:
    """`crossways_sort_choices` with its types, so that numbers go there as they are."""
    types = (*(c_void_p,) * 2, *(c_int64,) * 5, *(c_void_p,) * 4)
    sort: Callable[..., int] = ctypes.CFUNCTYPE(c_int64, *types)(("crossways_sort_choices", parts))
    return sort
