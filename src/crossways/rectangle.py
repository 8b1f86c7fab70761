"""The rectangular form of routing, in which transformers' families hand it over: weights and experts (T, K), with E
in the places of tokens that have fewer than K experts.

Legend: T tokens, P pairs, E experts, K places of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.native import rectangle, routing
from crossways.native.choices import sorted_choices


def to_rectangle(assignment: Assignment) -> tuple[Tensor, Tensor]:
    """Weights and expert indices, each (T, K): each token's pairs by expert, then empty places of index E and weight
    zero. K is the most experts of any token, at least 1. Not for assignments with slack.
    """
    tokens, num_experts = assignment.num_tokens, assignment.num_experts
    if routing.ready(assignment.token_P, assignment.expert_P):
        weight_P = assignment.weight_P
        plain = weight_P.dtype == torch.float32 and not (torch.is_grad_enabled() and weight_P.requires_grad)
        pairs = assignment.token_P, assignment.expert_P, weight_P if plain else None
        index_TK, place_P, weight_TK = rectangle.places(*pairs, tokens, num_experts)
        if weight_TK is not None:
            return weight_TK, index_TK
    else:
        order_P = torch.argsort(assignment.token_P, stable=True)
        token_P = assignment.token_P[order_P]
        count_T = assignment.experts_per_token_T()
        most = max(int(count_T.max()) if tokens else 1, 1)
        first_T = count_T.cumsum(0) - count_T
        sorted_P = token_P * most + torch.arange(len(token_P), device=token_P.device) - first_T[token_P]
        place_P = torch.empty_like(sorted_P).index_copy_(0, order_P, sorted_P)
        index_TK = count_T.new_full((tokens * most,), num_experts)
        index_TK = index_TK.index_copy_(0, place_P, assignment.expert_P).view(tokens, most)
    empty = assignment.weight_P.new_zeros(index_TK.numel())
    return empty.index_copy(0, place_P, assignment.weight_P).view_as(index_TK), index_TK


def from_rectangle(index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Assignment:
    """The pairs of the places that hold one of the experts 0 to E - 1; E and more mean that a place is empty, or that
    its expert belongs to another process.

    Args:
        index_TK: integers (T, K), none negative.
        weight_TK: floating point (T, K); gradients flow through it.
        num_experts: E.
    """
    if routing.ready(index_TK):
        return Assignment(*sorted_choices(index_TK, weight_TK, num_experts, empty=True), index_TK.shape[0])
    known = Assignment.from_topk(index_TK.clamp(max=num_experts), weight_TK, num_experts + 1)
    return known.of_experts(0, num_experts)
