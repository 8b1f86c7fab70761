"""`Router`: gate, score and selection, one decision per token.

Legend: B batch, S sequence, T = B * S tokens, D model width, E experts, C cutoffs (1 or E).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from crossways.errors import UserError
from crossways.routing import Context, GateOutput, Perturbation, Routing
from crossways.rules.score import Score
from crossways.rules.select import Selection, Threshold


class Router(nn.Module):
    """Turns hidden states into a `Routing`.

    The gate is given at call time when layers share it (the model owns the gates), or owned when passed here.
    Two buffers belong to the checkpoint: `cutoff`, the running estimate of the decode twin's threshold, and `bias`,
    what loss-free balancing adds to the scores when choosing (DeepSeek-V3, arXiv 2412.19437, eq. 16).
    """

    cutoff: Tensor
    bias: Tensor

    def __init__(
        self,
        num_experts: int,
        score: Score,
        select: Selection,
        *,
        renormalize: bool = False,
        cutoff_momentum: float = 0.99,
        bias_update_rate: float = 0.0,
        gate: nn.Module | None = None,
    ) -> None:
        """
        Args:
            num_experts: E.
            score: maps logits to scores.
            select: chooses the pairs.
            renormalize: scale each token's chosen weights to sum to one.
            cutoff_momentum: share of the old estimate kept at each training step, 0 to 1 (customary 0.9 to 0.999).
            bias_update_rate: step of loss-free balancing, 0 for none; 0.001 in DeepSeek-V3.
            gate: module from (B, S, D) and a `Context` to logits (B, S, E) or a `GateOutput`, or None to get one at
                every call.

        Raises:
            UserError: if the selection cannot work with E experts.
        """
        super().__init__()
        select.check(num_experts)
        self.num_experts, self.score, self.select = num_experts, score, select
        self.renormalize, self.cutoff_momentum = renormalize, cutoff_momentum
        self.bias_update_rate, self.gate = bias_update_rate, gate
        self.perturbation: Perturbation | None = None
        twin = select.decode_twin()
        self.has_cutoff = isinstance(twin, Threshold) and twin.value is None
        if self.has_cutoff:
            width = num_experts if isinstance(twin, Threshold) and twin.per_expert else 1
            self.register_buffer("cutoff", torch.full((width,), torch.nan, dtype=torch.float32))
        if bias_update_rate:
            self.register_buffer("bias", torch.zeros(num_experts, dtype=torch.float32))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert as any module, but keep the buffers in float32: they are compared with float32 scores, and
        an update of one per cent is lost in bfloat16."""
        kept = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def snapshot(self, buffer: str) -> Tensor | None:
        """A copy of `cutoff` or `bias` as it is now, None for a router without."""
        current = self._buffers.get(buffer)
        return None if current is None else current.clone()

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Routing:
        """Decide.

        Args:
            x_BSD: the router's input (B, S, D).
            context: what else it may look at.

        Raises:
            UserError: if the rule is a threshold that has neither a value nor an estimate yet.
        """
        context = context or Context()
        if context.reuse and context.previous is not None:
            return replace(context.previous, reused=True, cutoff_C=None)
        gate = context.gate if context.gate is not None else self.gate
        if gate is None:
            raise ValueError("this router owns no gate: pass one in the context or to the constructor")
        said = gate(x_BSD, context)
        out = said if isinstance(said, GateOutput) else GateOutput(said)
        deciding_BSE = out.logits_BSE if out.choice_BSE is None else out.choice_BSE
        allowed_BSE = None if context.valid_BS is None else context.valid_BS[..., None].expand_as(deciding_BSE)

        def decide(deciding_BSE: Tensor, allowed_BSE: Tensor | None) -> Routing:
            weighing_BSE = deciding_BSE if out.choice_BSE is None else out.logits_BSE
            routing = self._decide(weighing_BSE, deciding_BSE, allowed_BSE, context)
            return replace(routing, state=out.state, gate_loss=out.loss, fixed=out.fixed)

        if self.perturbation is not None:
            return self.perturbation(deciding_BSE, allowed_BSE, decide)
        return decide(deciding_BSE, allowed_BSE)

    def _decide(
        self, logits_BSE: Tensor, deciding_BSE: Tensor, allowed_BSE: Tensor | None, context: Context
    ) -> Routing:
        scores_BSE = self.score(logits_BSE)
        deciding_scores_BSE = scores_BSE if deciding_BSE is logits_BSE else self.score(deciding_BSE)
        choice_BSE = self._choice(deciding_scores_BSE, context)
        learns = self.training and self.has_cutoff
        observed_C = self.select.cutoff(choice_BSE.detach(), allowed_BSE) if learns else None
        assignment = self._rule(context, observed_C)(choice_BSE, scores_BSE, allowed_BSE)
        return Routing(
            logits_TE=logits_BSE.flatten(0, 1),
            scores_TE=scores_BSE.flatten(0, 1),
            choice_TE=choice_BSE.detach().flatten(0, 1),
            assignment=assignment.renormalized() if self.renormalize else assignment,
            valid_T=None if context.valid_BS is None else context.valid_BS.flatten(),
            cutoff_C=observed_C,
        )

    def _choice(self, scores_BSE: Tensor, context: Context) -> Tensor:
        if not self.bias_update_rate:
            return scores_BSE
        return scores_BSE + (self.bias if context.bias_E is None else context.bias_E)

    def _rule(self, context: Context, observed_C: Tensor | None) -> Selection:
        rule = self.select.at_step(context.step)
        rule = rule.decode_twin() if context.causal else rule
        if not (isinstance(rule, Threshold) and rule.value is None):
            return rule
        running_C = self.cutoff if context.cutoff_C is None else context.cutoff_C
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
        """Learn from a training batch what is not learnt by gradients: the cutoff and the balancing bias. Called once
        per forward pass, outside any recomputation.

        A batch without a cutoff (padding alone, or NaN scores) leaves the estimate as it is.
        """
        if self.bias_update_rate and not routing.reused:
            load_E = routing.assignment.load_E().float()
            self.bias += self.bias_update_rate * torch.sign(load_E.mean() - load_E)
        if routing.cutoff_C is None:
            return
        seen_C = routing.cutoff_C.to(self.cutoff.dtype)
        blended_C = torch.lerp(seen_C, self.cutoff, self.cutoff_momentum)
        updated_C = torch.where(self.cutoff.isnan(), seen_C, blended_C)
        self.cutoff.copy_(torch.where(seen_C.isnan(), self.cutoff, updated_C))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, score={self.score}, select={self.select}"
