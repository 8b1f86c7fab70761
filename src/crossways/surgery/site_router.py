"""What decides at a rerouted block, instead of the family's own router.

Legend: B batch, S sequence, T tokens, E experts, P chosen pairs, N shared experts, X experts and shared experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.router import Router
from crossways.routing import Context, Routing


class GivenLogits(nn.Module):
    """The gate of a router whose logits come from somewhere else."""

    def forward(self, logits_BSE: Tensor, context: Context) -> Tensor:
        """(B, S, E), as it is."""
        return logits_BSE


@dataclass
class Beside:
    """Shared experts that are scored like chosen ones."""

    logits_TN: Tensor
    """Float32 (T, N)."""
    weight_TN: Tensor = field(default_factory=lambda: torch.empty(0))
    """What they weigh beside the pairs of the last decision, float32 (T, N)."""


class SiteRouter(Router):
    """Decides by logits that the family's own router computed; may be told to repeat the family's own decision."""

    executed: Assignment | None = None
    """What the family itself decided in this pass, to be recorded instead of deciding anew."""
    bias_of_logits: bool = False
    """Whether the family's balancing bias is added to the logits, which are then what is compared."""
    beside: Beside | None = None
    """The shared experts whose weights belong to this pass' decision."""
    weigh: Callable[[Tensor], Tensor] | None = None
    """The family's weights (T, E) of logits (T, E), minus infinity where a pair may not be chosen, for a family whose
    weights are no scores."""

    def follow(self, device: torch.device, *, training: bool) -> None:
        """Go where the family's router is, and train when it does."""
        if self.training != training:
            self.train(training)
        if any(buffer is not None and buffer.device != device for buffer in self._buffers.values()):
            self.to(device)

    @contextmanager
    def repeating(self, executed: Assignment) -> Iterator[None]:
        """Record this decision of the family's, instead of deciding, while the context lasts."""
        self.executed = executed
        try:
            yield
        finally:
            self.executed = None

    def _decide(
        self, logits_BSE: Tensor, deciding_BSE: Tensor, allowed_BSE: Tensor | None, context: Context
    ) -> Routing:
        if self.executed is None:
            routing = super()._decide(logits_BSE, deciding_BSE, allowed_BSE, context)
            return self._weighed_beside(self._family_weighed(routing, allowed_BSE))
        scores_TE = self.score(logits_BSE, context.valid_BS).flatten(0, 1)
        return Routing(
            logits_TE=logits_BSE.flatten(0, 1),
            scores_TE=scores_TE,
            choice_TE=scores_TE.detach(),
            assignment=self.executed,
            valid_T=None if context.valid_BS is None else context.valid_BS.flatten(),
            num_rows=logits_BSE.shape[0],
        )

    def _family_weighed(self, routing: Routing, allowed_BSE: Tensor | None) -> Routing:
        if self.weigh is None:
            return routing
        logits_TE, pairs = routing.logits_TE, routing.assignment
        if allowed_BSE is not None:
            logits_TE = logits_TE.masked_fill(~allowed_BSE.reshape(logits_TE.shape), -torch.inf)
        weight_P = self.weigh(logits_TE)[pairs.token_P, pairs.expert_P]
        return replace(routing, assignment=pairs.with_weights(weight_P))

    def _weighed_beside(self, routing: Routing) -> Routing:
        """With shared experts under the same score, and under the same sum where weights sum to one."""
        if self.beside is None:
            return routing
        pairs, num_experts = routing.assignment, self.num_experts
        both_TX = self.score(torch.cat([routing.logits_TE, self.beside.logits_TN], -1)[None])[0]
        pairs = pairs.with_weights(both_TX[pairs.token_P, pairs.expert_P])
        weight_TN = both_TX[:, num_experts:]
        if self.renormalize:
            sum_T = pairs.weight_sum_T() + weight_TN.sum(-1)
            pairs = pairs.with_weights(pairs.weight_P / sum_T[pairs.token_P])
            weight_TN = weight_TN / sum_T[:, None]
        self.beside.weight_TN = weight_TN * self.weight_scale
        return replace(routing, assignment=pairs.with_weights(pairs.weight_P * self.weight_scale))

    def _choice(self, logits_BSE: Tensor, scores_BSE: Tensor, context: Context) -> Tensor:
        if self.bias_of_logits and context.bias_E is not None:
            return logits_BSE + context.bias_E
        return super()._choice(logits_BSE, scores_BSE, context)


def detached(routing: Routing) -> Routing:
    """Without the graph of gradients, which would otherwise live until the next pass."""
    if not (routing.logits_TE.requires_grad or routing.assignment.weight_P.requires_grad):
        return routing
    pairs = routing.assignment.with_weights(routing.assignment.weight_P.detach())
    logits_TE, scores_TE = routing.logits_TE.detach(), routing.scores_TE.detach()
    return replace(routing, logits_TE=logits_TE, scores_TE=scores_TE, assignment=pairs)
