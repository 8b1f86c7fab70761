"""What decides at a rerouted block, instead of the family's own router.

Legend: B batch, S sequence, T tokens, E experts, P chosen pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

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


class SiteRouter(Router):
    """Decides by logits that the family's own router computed; may be told to repeat the family's own decision."""

    executed: Assignment | None = None
    """What the family itself decided in this pass, to be recorded instead of deciding anew."""
    bias_of_logits: bool = False
    """Whether the family's balancing bias is added to the logits, which are then what is compared."""
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
            return self._family_weighed(super()._decide(logits_BSE, deciding_BSE, allowed_BSE, context), allowed_BSE)
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

    def _choice(self, logits_BSE: Tensor, scores_BSE: Tensor, context: Context) -> Tensor:
        if self.bias_of_logits and context.bias_E is not None:
            return logits_BSE + context.bias_E
        return super()._choice(logits_BSE, scores_BSE, context)
