"""Linear-time selection and sorting for routing on the CPU, in C++; callers keep a plain PyTorch path beside it.

Legend: T tokens, P pairs, E experts, K experts per token, G rows of N entries.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from crossways.native.loading import is_loaded, library, why_not_native

_SMALL = 4096


def fits(*tensors: Tensor | None) -> bool:
    """Whether to use these functions: for CPU tensors large enough that it matters, where the C++ parts exist. They
    compare in float32, so not for float64."""
    given = [tensor for tensor in tensors if tensor is not None]
    return (
        all(type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu for tensor in given)
        and all(tensor.dtype != torch.float64 for tensor in given)
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


def top_of_rows(choice_GN: Tensor, allowed_GN: Tensor | None, budget_G: Tensor) -> tuple[Tensor, Tensor]:
    """Mark each row's `budget_G` greatest allowed entries; earlier ones of equals first, NaN greatest of all.

    Returns:
        Boolean (G, N), and float32 (G,): the least entry marked, NaN where there is none.
    """
    rows, entries = choice_GN.shape
    choice_GN = choice_GN.detach().float().contiguous()
    allowed_GN = None if allowed_GN is None else allowed_GN.contiguous()
    budget_G = budget_G.to("cpu", torch.int64).contiguous()
    mask_GN = torch.empty(rows, entries, dtype=torch.bool)
    least_G = torch.full((rows,), torch.nan)
    library().crossways_top_of_rows(
        _at(choice_GN), _at(allowed_GN), _at(budget_G), c_int64(rows), c_int64(entries), _at(mask_GN), _at(least_G),
        _threads(),
    )  # fmt: skip
    return mask_GN, least_G


def top_k(choice_TE: Tensor, k: int) -> Tensor:
    """Indices of each row's k greatest entries, int64 (T, K), greatest first, earlier ones of equals first."""
    choice_TE = choice_TE.detach().float().contiguous()
    index_TK = torch.empty(len(choice_TE), k, dtype=torch.int64)
    rows, entries = choice_TE.shape
    library().crossways_top_k(_at(choice_TE), c_int64(rows), c_int64(entries), c_int64(k), _at(index_TK), _threads())
    return index_TK


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


def mask_pairs(mask_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (P,), experts (P,) and offsets (E + 1,) of a boolean mask's pairs, by expert, then by token; int64."""
    mask_TE = mask_TE.contiguous()
    tokens, experts = mask_TE.shape
    offsets_E1 = torch.empty(experts + 1, dtype=torch.int64)
    shape = _at(mask_TE), c_int64(tokens), c_int64(experts), _at(offsets_E1)
    native: ctypes.CDLL = library()
    native.crossways_mask_offsets(*shape)
    token_P = torch.empty(int(offsets_E1[-1]), dtype=torch.int64)
    expert_P = torch.empty_like(token_P)
    native.crossways_mask_pairs(*shape, _at(token_P), _at(expert_P))
    return token_P, expert_P, offsets_E1
