"""Routing on the CPU in C++: where it may be used, sorting, assigning, and the weights of pairs. What it chooses is
in `bits.py` and `budgeted.py`. Callers keep a plain PyTorch path beside it.

Legend: T tokens, P pairs, E experts, K experts per token, N tokens.
"""

from __future__ import annotations

from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from crossways.native.loading import is_loaded, library, why_not_native
from crossways.native.watched import is_watched

_SMALL = 4096


def fits(*tensors: Tensor | None) -> bool:
    """Whether to use these functions: for CPU tensors large enough that it matters, where the C++ parts exist. They
    compare in float32, so not for float64."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype == torch.float64:
            return False
    return solves(*tensors)


def solves(*tensors: Tensor | None) -> bool:
    """The same for `balanced`, which computes in float64."""
    most = 0
    for tensor in tensors:  # plain, as this is asked for every decision
        if tensor is None:
            continue
        if (type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter) or not tensor.is_cpu:
            return False
        most = max(most, tensor.numel())
    return most >= _SMALL and not is_compiling() and why_not_native() is None


def ready(*tensors: Tensor) -> bool:
    """Whether to use functions that make the same of tensors of any size as PyTorch would: for CPU tensors, where the
    C++ parts are at hand already or `fits` says so, and nobody watches. For few tokens they save small operations."""
    if is_watched(*tensors):
        return False
    for tensor in tensors:  # plain, as this is asked for every decision
        if not tensor.is_cpu:
            return False
    return is_loaded() or fits(*tensors)


def _at(tensor: Tensor | None) -> c_void_p:
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _threads() -> c_int64:
    return c_int64(torch.get_num_threads())


def _ready(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor  # every small operation counts here
    return tensor.detach().to(dtype).contiguous()


def _maybe(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous()


def balanced(gain_NE: Tensor, starts_G1: Tensor) -> Tensor | None:
    """Int64 (N,): one expert for each token, of a group's n tokens at most ceil(n / E) the same, of the greatest
    total gain there is.

    Args:
        gain_NE: floating point.
        starts_G1: first token of each group, and N.

    Returns:
        None if some gain is not finite.
    """
    wide = gain_NE.dtype == torch.float64
    gain_NE, starts_G1 = _ready(gain_NE, torch.float64 if wide else torch.float32), _ready(starts_G1, torch.int64)
    chosen_N = torch.empty(len(gain_NE), dtype=torch.int64)
    sizes = c_int64(len(starts_G1) - 1), c_int64(gain_NE.shape[1])
    solved = library().crossways_balanced(
        _at(gain_NE), c_int64(wide), _at(starts_G1), *sizes, _at(chosen_N), _threads()
    )
    return chosen_N if solved else None


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


def weights(matrix_TE: Tensor, token_P: Tensor, expert_P: Tensor) -> Tensor:
    """matrix_TE[token_P, expert_P], where no two pairs are the same. Differentiable, any number of times."""
    if not fits(matrix_TE) or matrix_TE.dtype != torch.float32:
        return matrix_TE[token_P, expert_P]
    found_P: Tensor = _Take.apply(matrix_TE, token_P, expert_P)
    return found_P


def taken(matrix: Tensor, value_P: Tensor, token_P: Tensor, expert_P: Tensor, word_TW: Tensor) -> Tensor:
    """The same where the values, float32, are known already, and the pairs as bits as well: their gradients alone are
    asked for. The matrix may be (..., E)."""
    found_P: Tensor = _Taken.apply(matrix, (value_P, token_P, expert_P, word_TW))
    return found_P


class _Taken(torch.autograd.Function):
    """Values that were taken from a matrix. In a tuple, so that they are no inputs, of which views would be made."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, found: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        ctx.save_for_backward(*found[1:])
        ctx.shape = matrix.shape
        return found[0]

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None]:
        token_P, expert_P, word_TW = ctx.saved_tensors
        tokens, experts = len(word_TW), ctx.shape[-1]
        if torch.is_grad_enabled():  # somebody differentiates this once more
            grad_TE: Tensor = _Put.apply(grad_P, token_P, expert_P, tokens, experts)
            return grad_TE.view(ctx.shape), None
        grad_P, out = grad_P.contiguous(), torch.empty(ctx.shape)
        sizes = c_int64(tokens), c_int64(experts)
        library().crossways_spread(_at(word_TW), _at(grad_P), *sizes, _at(out), _threads())
        return out, None


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
