"""Token choice and threshold for few tokens, in one call: a step of generation is a good part PyTorch's own overhead.

Legend: B batch, S sequence, E experts, T = B * S tokens.
"""

from __future__ import annotations

from ctypes import c_float, c_int64

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.native import library, routing
from crossways.rules.select.base import Selection, top_k_index
from crossways.rules.select.threshold import Threshold
from crossways.rules.select.top_k import TopK

MOST = 16
"""Tokens up to which this is worth its own path."""


def few_pairs(
    rule: Selection,
    choice_BSE: Tensor,
    scores_BSE: Tensor,
    allowed_BSE: Tensor | None,
    *,
    renormalize: bool,
    weight_scale: float,
) -> Assignment | None:
    """What `rule` chooses, weighed: the same as calling it, renormalising and scaling, bit for bit.

    Returns:
        None where that is not for here: many tokens, another rule, gradients, another device.
    """
    batch, sequence, experts = choice_BSE.shape
    tokens = batch * sequence
    if not 0 < tokens <= MOST or not _known(rule, allowed_BSE) or not _plain(choice_BSE, scores_BSE):
        return None
    pairs = torch.empty(2 * tokens * experts, dtype=torch.int64)
    weight_P = torch.empty(tokens * experts)
    offsets_E1 = torch.empty(experts + 1, dtype=torch.int64)
    index_TK = top_k_index(choice_BSE.reshape(tokens, experts), rule.k) if isinstance(rule, TopK) else None
    # Named, so that they live until the call is over.
    cutoff_C, choice_BSE, scores_BSE = _cutoff(rule), choice_BSE.contiguous(), scores_BSE.contiguous()
    allowed_BSE = None if allowed_BSE is None else allowed_BSE.contiguous()
    token, expert = pairs.data_ptr(), pairs.data_ptr() + 8 * tokens * experts
    library().crossways_choose(
        routing._at(choice_BSE),
        routing._at(scores_BSE),
        routing._at(allowed_BSE),
        routing._at(cutoff_C),
        c_int64(1 if cutoff_C is None else cutoff_C.numel()),
        routing._at(index_TK),
        c_int64(0 if index_TK is None else index_TK.shape[1]),
        c_int64(tokens),
        c_int64(experts),
        c_int64(renormalize),
        c_float(weight_scale),
        routing.c_void_p(token),
        routing.c_void_p(expert),
        routing._at(weight_P),
        routing._at(offsets_E1),
    )
    count, room = int(offsets_E1[-1]), tokens * experts
    return Assignment(pairs[:count], pairs[room : room + count], weight_P[:count], offsets_E1, tokens)


def _known(rule: Selection, allowed_BSE: Tensor | None) -> bool:
    if type(rule) is Threshold:
        return rule.value is not None
    return type(rule) is TopK and allowed_BSE is None


def _plain(choice_BSE: Tensor, scores_BSE: Tensor) -> bool:
    """On the CPU, in float32, and without anybody who wants gradients."""
    wanted = torch.is_grad_enabled() and scores_BSE.requires_grad
    return not wanted and choice_BSE.dtype == scores_BSE.dtype == torch.float32 and routing.ready(choice_BSE)


def _cutoff(rule: Selection) -> Tensor | None:
    if not isinstance(rule, Threshold):
        return None
    value = rule.value
    return value.float().contiguous() if isinstance(value, Tensor) else torch.tensor([float(value or 0.0)])
