"""`Router`: gate, score and selection, one decision per token.

Legend: B batch, S sequence, T = B * S tokens, D model width, E experts, C cutoffs (1 or E).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.rules.score import Score
from crossways.rules.select import Selection, Threshold


@dataclass(frozen=True)
class Routing:
    """What one router decided for one batch."""

    logits_TE: Tensor
    """Raw router logits, float32 (T, E)."""
    scores_TE: Tensor
    """Scores, float32 (T, E)."""
    assignment: Assignment
    """The pairs that are executed."""
    valid_T: Tensor | None = None
    """Boolean (T,), false for padding; None when there is none."""
    cutoff_C: Tensor | None = None
    """The threshold that would have spent the same budget on this batch, for rules whose decode twin needs it."""


Decide = Callable[[Tensor, Tensor | None], Routing]
Perturbation = Callable[[Tensor, Tensor | None, Decide], Routing]
"""What if: gets the logits (B, S, E), the allowed pairs (or None) and the decision itself, returns another one."""


class Router(nn.Module):
    """Turns hidden states into a `Routing`.

    The gate is given at call time when layers share it (the model owns the gates), or owned when passed here.
    `cutoff`, a buffer of the checkpoint, is the running estimate of the decode twin's threshold.
    """

    cutoff: Tensor

    def __init__(
        self,
        num_experts: int,
        score: Score,
        select: Selection,
        *,
        renormalize: bool = False,
        cutoff_momentum: float = 0.99,
        gate: nn.Module | None = None,
    ) -> None:
        """
        Args:
            num_experts: E.
            score: maps logits to scores.
            select: chooses the pairs.
            renormalize: scale each token's chosen weights to sum to one.
            cutoff_momentum: share of the old estimate kept at each training step, 0 to 1 (customary 0.9 to 0.999).
            gate: module from (B, S, D) to logits (B, S, E), or None to get one at every call.

        Raises:
            UserError: if the selection cannot work with E experts.
        """
        super().__init__()
        select.check(num_experts)
        self.num_experts, self.score, self.select = num_experts, score, select
        self.renormalize, self.cutoff_momentum = renormalize, cutoff_momentum
        self.gate = gate
        self.perturbation: Perturbation | None = None
        twin = select.decode_twin()
        self.has_cutoff = isinstance(twin, Threshold) and twin.value is None
        if self.has_cutoff:
            width = num_experts if isinstance(twin, Threshold) and twin.per_expert else 1
            self.register_buffer("cutoff", torch.full((width,), torch.nan, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert as any module, but keep the cutoff in float32: it is compared with float32 scores, and
        an update of one per cent is lost in bfloat16."""
        kept_C = self._buffers.get("cutoff")
        super()._apply(fn, recurse)
        if kept_C is not None and self.cutoff.dtype != kept_C.dtype:
            self.cutoff = kept_C.to(self.cutoff.device)
        return self

    def forward(
        self,
        x_BSD: Tensor,
        *,
        gate: nn.Module | None = None,
        valid_BS: Tensor | None = None,
        causal: bool = False,
        cutoff_C: Tensor | None = None,
    ) -> Routing:
        """Decide.

        Args:
            x_BSD: the router's input (B, S, D).
            gate: the shared gate, for a router that owns none.
            valid_BS: boolean (B, S), false for padding, which chooses nobody and competes for nothing.
            causal: use the selection's decode twin.
            cutoff_C: the cutoff to decide by, default the running estimate. A caller that recomputes this forward
                after `observe` (gradient checkpointing) passes a copy taken before it.

        Raises:
            UserError: if the rule is a threshold that has neither a value nor an estimate yet.
        """
        used = gate if gate is not None else self.gate
        if used is None:
            raise ValueError("this router owns no gate: pass `gate=` at the call or to the constructor")
        logits_BSE = used(x_BSD)
        allowed_BSE = None if valid_BS is None else valid_BS[..., None].expand_as(logits_BSE)

        def decide(logits_BSE: Tensor, allowed_BSE: Tensor | None) -> Routing:
            return self._decide(logits_BSE, allowed_BSE, valid_BS, causal, cutoff_C)

        if self.perturbation is not None:
            return self.perturbation(logits_BSE, allowed_BSE, decide)
        return decide(logits_BSE, allowed_BSE)

    def _decide(
        self,
        logits_BSE: Tensor,
        allowed_BSE: Tensor | None,
        valid_BS: Tensor | None,
        causal: bool,
        running_C: Tensor | None,
    ) -> Routing:
        scores_BSE = self.score(logits_BSE)
        learns = self.training and self.has_cutoff
        observed_C = self.select.cutoff(scores_BSE.detach(), allowed_BSE) if learns else None
        assignment = self._rule(causal, running_C, observed_C)(scores_BSE, scores_BSE, allowed_BSE)
        return Routing(
            logits_TE=logits_BSE.flatten(0, 1),
            scores_TE=scores_BSE.flatten(0, 1),
            assignment=assignment.renormalized() if self.renormalize else assignment,
            valid_T=None if valid_BS is None else valid_BS.flatten(),
            cutoff_C=observed_C,
        )

    def _rule(self, causal: bool, running_C: Tensor | None, observed_C: Tensor | None) -> Selection:
        rule = self.select.decode_twin() if causal else self.select
        if not (isinstance(rule, Threshold) and rule.value is None):
            return rule
        running_C = self.cutoff if running_C is None else running_C
        if not running_C.isnan().any():
            return rule.at(running_C)
        if observed_C is not None:  # a threshold rule's first training step has nothing but its own batch to go by
            return rule.at(observed_C)
        raise UserError(
            f"the router of {self.select.name!r} has no cutoff yet for its causal decode twin: train the model for a "
            "step or calibrate it on text first"
        )

    @torch.no_grad()
    def observe(self, routing: Routing) -> None:
        """Fold a training batch's cutoff into the running estimate. Called once per step, outside any recomputation.

        A batch without a cutoff (padding alone, or NaN scores) leaves the estimate as it is.
        """
        if routing.cutoff_C is None:
            return
        seen_C = routing.cutoff_C.to(self.cutoff.dtype)
        blended_C = torch.lerp(seen_C, self.cutoff, self.cutoff_momentum)
        updated_C = torch.where(self.cutoff.isnan(), seen_C, blended_C)
        self.cutoff.copy_(torch.where(seen_C.isnan(), self.cutoff, updated_C))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, score={self.score}, select={self.select}"
