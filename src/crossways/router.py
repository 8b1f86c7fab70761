"""`Router`: gate, score and selection, one decision per token.

Legend: B batch, S sequence, T = B * S tokens, D model width, E experts, C cutoffs (1 or E).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.routing import Context, GateOutput, Perturbation, Routing
from crossways.rules.score import Score
from crossways.rules.select import Selection, Threshold


@dataclass(frozen=True)
class Sparsity:
    """How the weight of the sparsity loss follows the density of what is executed (ReMoE, Wang et al. 2024, arXiv
    2412.14711, section 3.3, eq. 7-8): multiplied by `growth` after a batch that is too dense, divided by
    it after a too sparse one."""

    target: float
    """Share of pairs to execute, k / E, above 0 and at most 1."""
    start: float = 1e-8
    """First weight; 1e-8 in the paper, small enough that training starts dense."""
    growth: float = 1.2
    """Factor, above 1; 1.2 in the paper."""

    def change(self, density: Tensor) -> Tensor:
        """What to multiply the weight by after a batch of this density, scalar; 1 where it is NaN."""
        return self.growth ** torch.sign(density - self.target).nan_to_num(0.0)


class Router(nn.Module):
    """Turns hidden states into a `Routing`.

    The gate is given at call time when layers share it (the model owns the gates), or owned when passed here.
    What is learnt without gradients are buffers, float32 and part of the checkpoint, only where they are needed:
    `cutoff` (C,), the running estimate of the decode twin's threshold; `normaliser` (E,), that of its score; `bias`
    (E,), what loss-free balancing adds to the scores when choosing (DeepSeek-V3, arXiv 2412.19437, eq. 16); and
    `sparsity_coef` (), the weight of the sparsity loss that ReMoE adapts (arXiv 2412.14711, eq. 7).
    """

    cutoff: Tensor
    normaliser: Tensor
    bias: Tensor
    sparsity_coef: Tensor

    def __init__(
        self,
        num_experts: int,
        score: Score,
        select: Selection,
        *,
        renormalize: bool = False,
        weight_scale: float = 1.0,
        cutoff_momentum: float = 0.99,
        bias_update_rate: float = 0.0,
        expert_dropout: float = 0.0,
        input_jitter: float = 0.0,
        sparsity: Sparsity | None = None,
        gate: nn.Module | None = None,
    ) -> None:
        """
        Args:
            num_experts: E.
            score: maps logits to scores.
            select: chooses the pairs.
            renormalize: scale each token's chosen weights to sum to one.
            weight_scale: factor on all weights, after renormalising.
            cutoff_momentum: share of the old estimates (cutoff, normaliser) kept at each training step, 0 to 1
                (customary 0.9 to 0.999).
            bias_update_rate: step of loss-free balancing, 0 for none; 0.001 in DeepSeek-V3.
            expert_dropout: probability that a pair may not be chosen in a training step, 0 to below 1 (0.05 in
                sigma-MoE).
            input_jitter: eps, 0 to below 1: in training the gate, but not the experts, reads its input times
                uniform(1 - eps, 1 + eps), drawn for every number (Switch Transformers, arXiv 2101.03961, the
                appendix on exploration across experts; 0.01 in the authors' code).
            sparsity: how to adapt the weight of the sparsity loss, None for no such loss.
            gate: module from (B, S, D) and a `Context` to logits (B, S, E) or a `GateOutput`, or None to get one at
                every call.

        Raises:
            UserError: if the selection cannot work with E experts.
        """
        super().__init__()
        select.check(num_experts)
        self.num_experts, self.score, self.select = num_experts, score, select
        self.renormalize, self.weight_scale, self.cutoff_momentum = renormalize, weight_scale, cutoff_momentum
        self.bias_update_rate, self.expert_dropout = bias_update_rate, expert_dropout
        self.input_jitter = input_jitter
        self.sparsity, self.gate = sparsity, gate
        self.perturbation: Perturbation | None = None
        twin = select.decode_twin()
        self.has_cutoff = isinstance(twin, Threshold) and twin.value is None
        self.has_normaliser = score.normaliser(torch.zeros(1, 1, num_experts, device="cpu")) is not None
        shapes = {
            "cutoff": (num_experts if twin.per_expert else 1,) if isinstance(twin, Threshold) else None,
            "normaliser": (num_experts,) if self.has_normaliser else None,
            "bias": (num_experts,) if bias_update_rate else None,
            "sparsity_coef": () if sparsity else None,
        }
        for name, shape in shapes.items():
            if shape is not None and (name != "cutoff" or self.has_cutoff):
                self.register_buffer(name, torch.full(shape, self.initial(name), dtype=torch.float32))

    def initial(self, buffer: str) -> float:
        """The value with which a buffer starts; NaN means that nothing is known yet."""
        if buffer == "sparsity_coef":
            return self.sparsity.start if self.sparsity else 0.0
        return 0.0 if buffer == "bias" else torch.nan

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
        """A copy of `cutoff`, `normaliser` or `bias` as it is now, None for a router without."""
        current = self._buffers.get(buffer)
        return None if current is None else current.clone()

    def forward(self, x_BSD: Tensor, context: Context | None = None) -> Routing:
        """Decide.

        Args:
            x_BSD: the router's input (B, S, D).
            context: what else it may look at.

        Raises:
            UserError: if the decode twin needs an estimate, of a cutoff or a normaliser, that was never made.
        """
        context = context or Context()
        if context.reuse and context.previous is not None:
            return replace(context.previous, reused=True, cutoff_C=None, normaliser_E=None)
        gate = context.gate if context.gate is not None else self.gate
        if gate is None:
            raise ValueError("this router owns no gate: pass one in the context or to the constructor")
        if self.training and self.input_jitter:
            x_BSD = x_BSD.float()  # factors so near to one would be few in bfloat16
            x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(1 - self.input_jitter, 1 + self.input_jitter)
        said = gate(x_BSD, context)
        out = said if isinstance(said, GateOutput) else GateOutput(said)
        deciding_BSE = out.logits_BSE if out.choice_BSE is None else out.choice_BSE
        allowed_BSE = None if context.valid_BS is None else context.valid_BS[..., None].expand_as(deciding_BSE)
        if self.training and self.expert_dropout:
            kept_BSE = torch.rand_like(deciding_BSE) >= self.expert_dropout
            allowed_BSE = kept_BSE if allowed_BSE is None else allowed_BSE & kept_BSE

        def decide(deciding_BSE: Tensor, allowed_BSE: Tensor | None) -> Routing:
            weighing_BSE = deciding_BSE if out.choice_BSE is None else out.logits_BSE
            routing = self._decide(weighing_BSE, deciding_BSE, allowed_BSE, context)
            noise = None if out.noise is None else out.noise.flatten()
            return replace(routing, state=out.state, gate_loss=out.loss, fixed=out.fixed, noise=noise)

        if self.perturbation is not None:
            return self.perturbation(deciding_BSE, allowed_BSE, decide)
        return decide(deciding_BSE, allowed_BSE)

    def _decide(
        self, logits_BSE: Tensor, deciding_BSE: Tensor, allowed_BSE: Tensor | None, context: Context
    ) -> Routing:
        seen_E = self.score.normaliser(logits_BSE, context.valid_BS) if self.training else None
        score = self._scored_by(context, seen_E)
        scores_BSE = score(logits_BSE, context.valid_BS)
        deciding_scores_BSE = scores_BSE if deciding_BSE is logits_BSE else score(deciding_BSE, context.valid_BS)
        choice_BSE = self._choice(deciding_BSE, deciding_scores_BSE, context)
        seen_C = self._cutoff_of(deciding_BSE, choice_BSE, allowed_BSE, context, seen_E)
        assignment = self._selected_by(context, seen_C)(choice_BSE, scores_BSE, allowed_BSE)
        return Routing(
            logits_TE=logits_BSE.flatten(0, 1),
            scores_TE=scores_BSE.flatten(0, 1),
            choice_TE=choice_BSE.detach().flatten(0, 1),
            assignment=self._weighted(assignment),
            valid_T=None if context.valid_BS is None else context.valid_BS.flatten(),
            cutoff_C=seen_C,
            normaliser_E=seen_E,
            sparsity_coef=self.sparsity_coef.clone() if self.sparsity else None,
            num_rows=logits_BSE.shape[0],
        )

    def _weighted(self, assignment: Assignment) -> Assignment:
        assignment = assignment.renormalized() if self.renormalize else assignment
        if self.weight_scale == 1.0:
            return assignment
        return assignment.with_weights(assignment.weight_P * self.weight_scale)

    def _choice(self, logits_BSE: Tensor, scores_BSE: Tensor, context: Context) -> Tensor:
        choice_BSE = logits_BSE if self.select.chooses_by == "logits" else scores_BSE
        bias_E = self._buffers.get("bias") if context.bias_E is None else context.bias_E
        return choice_BSE if bias_E is None else choice_BSE + bias_E

    def _cutoff_of(
        self,
        logits_BSE: Tensor,
        choice_BSE: Tensor,
        allowed_BSE: Tensor | None,
        context: Context,
        seen_E: Tensor | None,
    ) -> Tensor | None:
        """This batch's cutoff, on the scores that the decode twin will compare with it."""
        if not (self.training and self.has_cutoff):
            return None
        if seen_E is not None and not context.causal:
            twin_BSE = self.score.decode_twin().at(seen_E)(logits_BSE, context.valid_BS)
            choice_BSE = self._choice(logits_BSE, twin_BSE, context)
        return self.select.cutoff(choice_BSE.detach(), allowed_BSE)

    def _scored_by(self, context: Context, seen_E: Tensor | None) -> Score:
        twin = self.score.decode_twin() if context.causal else self.score
        if not (context.causal and self.has_normaliser):
            return twin
        return twin.at(self._running("normaliser", context.normaliser_E, seen_E, self.score.name))

    def _selected_by(self, context: Context, seen_C: Tensor | None) -> Selection:
        rule = self.select.at_step(context.step)
        rule = rule.decode_twin() if context.causal else rule
        if not (isinstance(rule, Threshold) and rule.value is None):
            return rule.in_training() if self.training else rule
        return rule.at(self._running("cutoff", context.cutoff_C, seen_C, self.select.name))

    def _running(self, buffer: str, given: Tensor | None, seen: Tensor | None, rule: str) -> Tensor:
        """The running estimate; a rule's first training step has nothing but its own batch to go by."""
        running = getattr(self, buffer) if given is None else given
        if not running.isnan().any():
            return running
        if seen is not None:
            return seen
        raise UserError(
            f"the router of {rule!r} has no {buffer} yet for its causal decode twin: train the model for a step or "
            "calibrate it on text first"
        )

    @torch.no_grad()
    def observe(self, routing: Routing, density: Tensor | None = None) -> None:
        """Learn from a training batch what is not learnt by gradients. Called once per forward pass, outside any
        recomputation.

        A batch without an estimate (padding alone, or NaN scores) leaves the old one as it is.

        Args:
            routing: what this router decided.
            density: mean of `Routing.density` over the routers that share one sparsity target, as in ReMoE; by
                default that of this routing.
        """
        if routing.reused:
            return
        if self.bias_update_rate:
            load_E = routing.assignment.load_E().float()
            self.bias += self.bias_update_rate * torch.sign(load_E.mean() - load_E)
        if self.sparsity is not None:
            self.sparsity_coef *= self.sparsity.change(routing.density() if density is None else density)
        self._blend("cutoff", routing.cutoff_C)
        self._blend("normaliser", routing.normaliser_E)

    def _blend(self, buffer: str, seen: Tensor | None) -> None:
        if seen is None:
            return
        running = getattr(self, buffer)
        seen = seen.to(running.dtype)
        updated = torch.where(running.isnan(), seen, torch.lerp(seen, running, self.cutoff_momentum))
        running.copy_(torch.where(seen.isnan(), running, updated))

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, score={self.score}, select={self.select}"
