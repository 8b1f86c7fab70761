"""From pairs sorted by expert to the rectangular form of routing, on the CPU, in C++ (back is in `choices.py`);
`crossways.rectangle` keeps a plain PyTorch path beside it.

Legend: T tokens, P pairs, E experts, K places of a token.
"""

from __future__ import annotations

from ctypes import c_int64

import torch
from torch import Tensor

from crossways.native.loading import library
from crossways.native.routing import _at


def places(
    token_P: Tensor, expert_P: Tensor, weight_P: Tensor | None, num_tokens: int, num_experts: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rectangular form of some pairs.

    Args:
        token_P: int64 (P,).
        expert_P: int64 (P,).
        weight_P: float32 (P,) whose gradients nobody wants, or None.
        num_tokens: T.
        num_experts: E.

    Returns:
        Each token's experts, int64 (T, K), then E in places that are empty, with K the most experts of any token, at
        least 1; where each pair lies in it, counted row by row, int64 (P,); and weights (T, K), if given.
    """
    token_P, expert_P = token_P.contiguous(), expert_P.contiguous()
    weight_P = None if weight_P is None else weight_P.contiguous()
    place_P = torch.empty_like(token_P)
    native = library()
    pairs, tokens = c_int64(token_P.numel()), c_int64(num_tokens)
    native.crossways_places.restype = c_int64
    most = max(native.crossways_places(_at(token_P), pairs, tokens, _at(place_P)), 1)
    index_TK = torch.empty(num_tokens, most, dtype=torch.int64)
    weight_TK = None if weight_P is None else torch.empty(num_tokens, most)
    native.crossways_fill_places(
        _at(token_P), _at(expert_P), _at(weight_P), pairs, tokens, c_int64(most), c_int64(num_experts), _at(place_P),
        _at(index_TK), _at(weight_TK),
    )  # fmt: skip
    return index_TK, place_P, weight_TK
