"""Disable the top experts of every token.

Legend: B batch, S sequence, T = B * S tokens, E experts, P pairs, N experts disabled per token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.routing import Decide, Routing


@dataclass(frozen=True)
class DisableTop:
    """Each token loses the `n` experts of greatest weight that it would have visited; the selection is made again
    among the rest (CartesianMoE, arXiv 2410.16077, table 4, for n = 1). Every router of a layer loses its own.

    The paper does not say whether the remaining weights are rescaled. Raw, the next experts come with the small
    weights their scores give them, so part of the damage is a smaller output; with `renormalize` each token's weights
    are scaled to the sum they had before, and only the choice of experts differs.
    """

    n: int = 1
    """Experts disabled per token, at least 1; the paper uses 1, 2 and 3 are its obvious continuation."""
    renormalize: bool = False
    """Scale each token's new weights to the sum of its undisturbed weights."""

    def __post_init__(self) -> None:
        if self.n < 1:
            raise UserError(f"DisableTop: n must be at least 1, got {self.n}")

    def __call__(self, logits_BSE: Tensor, allowed_BSE: Tensor | None, decide: Decide) -> Routing:
        """Decide, forbid the top pairs, decide again."""
        undisturbed = decide(logits_BSE, allowed_BSE)
        keep_BSE = ~top_pairs(undisturbed.assignment, self.n).view_as(logits_BSE)
        routing = decide(logits_BSE, keep_BSE if allowed_BSE is None else keep_BSE & allowed_BSE)
        if not self.renormalize:
            return routing
        old_T, new_T = undisturbed.assignment.weight_sum_T(), routing.assignment.weight_sum_T()
        scale_T = torch.where(new_T > 0, old_T / new_T, 1.0)
        weight_P = routing.assignment.weight_P * scale_T[routing.assignment.token_P]
        return replace(routing, assignment=routing.assignment.with_weights(weight_P))


def top_pairs(assignment: Assignment, n: int) -> Tensor:
    """Boolean (T, E): each token's `n` executed pairs of greatest weight, all of them where it has fewer."""
    executed_TE = assignment.to_mask()
    weight_TE = assignment.to_dense().masked_fill(~executed_TE, -torch.inf)
    index_TN = weight_TE.topk(min(n, assignment.num_experts), dim=-1).indices
    return torch.zeros_like(executed_TE).scatter(-1, index_TN, True) & executed_TE
