"""`Router`: gate, score and selection, one decision per token.

Legend: B batch, S sequence, T = B * S tokens, D model width, E experts, C cutoffs (1 or E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.learnt import Learnt, Sparsity
from crossways.routing import Context, GateOutput, Perturbation, Routing
from crossways.rules.score import Score
from crossways.rules.select import Selection, Threshold
from crossways.rules.select.few import few_pairs
from crossways.weighing import Renormalize, weighed

__all__ = ["Router", "Sparsity"]


class Router(Learnt):
    """Turns hidden states into a `Routing`.

    The gate is given at call time when layers share it (the model owns the gates), or owned when passed here.
    What is learnt without gradients is `Learnt`'s; to the `bias`, if there is one, loss-free balancing (DeepSeek-V3,
    arXiv 2412.19437, eq. 16) gives the choice by scores, quantile balancing the choice by logits.
    """

    def __init__(
        self,
        num_experts: int,
        score: Score,
        select: Selection,
        *,
        renormalize: Renormalize = False,
        weight_scale: float = 1.0,
        zero_slots: tuple[int, int] = (0, 0),
        logit_offsets: Sequence[tuple[int, int, float]] = (),
        cutoff_momentum: float = 0.99,
        bias_update_rate: float = 0.0,
        expert_dropout: float = 0.0,
        input_jitter: float = 0.0,
        input_dropout: float = 0.0,
        price_momentum: float | None = None,
        sparsity: Sparsity | None = None,
        dtype: torch.dtype = torch.float32,
        gate: nn.Module | None = None,
    ) -> None:
        """
        Args:
            num_experts: E.
            score: maps logits to scores.
            select: chooses the pairs.
            renormalize: how each token's chosen weights are scaled, see `crossways.weighing.weighed`.
            weight_scale: factor on all weights, after renormalising.
            zero_slots: the first zero expert, and the one after the last, for `renormalize` "with_zero".
            logit_offsets: first expert, the one after the last, and what is added to the logits of these.
            cutoff_momentum: share of the old estimates (cutoff, normaliser) kept at each training step, 0 to 1
                (customary 0.9 to 0.999).
            bias_update_rate: step of loss-free balancing, 0 for none; 0.001 in DeepSeek-V3.
            expert_dropout: probability that a pair may not be chosen in a training step, 0 to below 1 (0.05 in
                sigma-MoE).
            input_jitter: eps, 0 to below 1: in training the gate, but not the experts, reads its input times
                uniform(1 - eps, 1 + eps), drawn for every number (Switch Transformers, arXiv 2101.03961, the
                appendix on exploration across experts; 0.01 in the authors' code).
            input_dropout: probability that a number of the gate's input is zero in training, 0 to below 1.
            price_momentum: share of the old prices kept at each step of quantile balancing, 0 to below 1; None for no
                such balancing.
            sparsity: how to adapt the weight of the sparsity loss, None for no such loss.
            dtype: of logits, scores and what is compared, float32 or float64; weights are float32 in both.
            gate: module from (B, S, D) and a `Context` to logits (B, S, E) or a `GateOutput`, or None to get one at
                every call.

        Raises:
            UserError: if the selection cannot work with E experts.
        """
        select.check(num_experts)
        super().__init__(
            num_experts,
            score,
            select,
            cutoff_momentum=cutoff_momentum,
            bias_update_rate=bias_update_rate,
            price_momentum=price_momentum,
            sparsity=sparsity,
        )
        self.renormalize, self.weight_scale, self.expert_dropout = renormalize, weight_scale, expert_dropout
        self.zero_slots, self.logit_offsets, self.dtype = zero_slots, tuple(logit_offsets), dtype
        self.input_jitter, self.input_dropout, self.gate = input_jitter, input_dropout, gate
        self.perturbation: Perturbation | None = None

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
        if torch.float64 in (self.dtype, x_BSD.dtype):
            x_BSD = x_BSD.to(self.dtype)
        said = gate(self._disturbed(x_BSD) if self.training else x_BSD, context)
        out = self._said(said)
        deciding_BSE = out.logits_BSE if out.choice_BSE is None else out.choice_BSE
        allowed_BSE = None if context.valid_BS is None else context.valid_BS[..., None].expand_as(deciding_BSE)
        if self.training and self.expert_dropout and context.decided is None:
            kept_BSE = torch.rand_like(deciding_BSE) >= self.expert_dropout
            allowed_BSE = kept_BSE if allowed_BSE is None else allowed_BSE & kept_BSE

        def decide(deciding_BSE: Tensor, allowed_BSE: Tensor | None) -> Routing:
            weighing_BSE = deciding_BSE if out.choice_BSE is None else out.logits_BSE
            routing = self._decide(weighing_BSE, deciding_BSE, allowed_BSE, context)
            if isinstance(said, Tensor):  # logits alone: nothing to add
                return routing
            noise = None if out.noise is None else out.noise.flatten()
            cosine_TE = None if out.cosine_BSE is None else out.cosine_BSE.flatten(0, 1)
            routing = replace(routing, noise=noise, cosine_TE=cosine_TE)
            return replace(routing, state=out.state, gate_loss=out.loss, fixed=out.fixed)

        if self.perturbation is not None:
            return self.perturbation(deciding_BSE, allowed_BSE, decide)
        return decide(deciding_BSE, allowed_BSE)

    def _said(self, said: Tensor | GateOutput) -> GateOutput:
        """What the gate said, in this router's dtype and with its offsets."""
        out = said if isinstance(said, GateOutput) else GateOutput(said)
        if out.logits_BSE.dtype != self.dtype:
            out = replace(out, logits_BSE=out.logits_BSE.to(self.dtype))
        if not self.logit_offsets:
            return out
        choice_BSE = None if out.choice_BSE is None else self._offset(out.choice_BSE)
        return replace(out, logits_BSE=self._offset(out.logits_BSE), choice_BSE=choice_BSE)

    def _offset(self, logits_BSE: Tensor) -> Tensor:
        logits_BSE = logits_BSE.clone()
        for first, end, offset in self.logit_offsets:
            logits_BSE[..., first:end] += offset
        return logits_BSE

    def _disturbed(self, x_BSD: Tensor) -> Tensor:
        """What the gate reads in training."""
        if self.input_jitter:
            x_BSD = x_BSD.to(self.dtype)  # factors so near to one would be few in bfloat16
            x_BSD = x_BSD * torch.empty_like(x_BSD).uniform_(1 - self.input_jitter, 1 + self.input_jitter)
        return functional.dropout(x_BSD, self.input_dropout) if self.input_dropout else x_BSD

    def _decide(
        self, logits_BSE: Tensor, deciding_BSE: Tensor, allowed_BSE: Tensor | None, context: Context
    ) -> Routing:
        seen_E = self.score.normaliser(logits_BSE, context.valid_BS) if self.training else None
        score = self._scored_by(context, seen_E)
        scores_BSE = score(logits_BSE, context.valid_BS)
        deciding_scores_BSE = scores_BSE if deciding_BSE is logits_BSE else score(deciding_BSE, context.valid_BS)
        choice_BSE = self._choice(deciding_BSE, deciding_scores_BSE, context)
        seen_C = self._cutoff_of(deciding_BSE, choice_BSE, allowed_BSE, context, seen_E)
        rule = self._selected_by(context, seen_C) if self.training or context.decided is None else None
        if context.decided is not None:
            assignment = self.weighted(context.decided.among(scores_BSE, allowed_BSE), scores_BSE.flatten(0, 1))
        else:
            assert rule is not None
            assignment = self._assigned(rule, choice_BSE, scores_BSE, allowed_BSE)
        asking = rule.asking() if rule is not None and self.training else None
        return Routing(
            logits_TE=logits_BSE.flatten(0, 1),
            scores_TE=scores_BSE.flatten(0, 1),
            choice_TE=choice_BSE.detach().flatten(0, 1),
            assignment=assignment,
            asked=None if asking is None else asking(choice_BSE, scores_BSE, allowed_BSE),
            earlier_load_E=self.step_load(),
            valid_T=None if context.valid_BS is None else context.valid_BS.flatten(),
            cutoff_C=seen_C,
            normaliser_E=seen_E,
            sparsity_coef=self.sparsity_coef.clone() if self.sparsity else None,
            num_rows=logits_BSE.shape[0],
        )

    @property
    def sums_to_one(self) -> bool:
        """Whether each token's weights do, before they are scaled."""
        return self.renormalize in (True, "softmax")

    def weighted(self, assignment: Assignment, scores_TE: Tensor) -> Assignment:
        """Pairs that weigh what they score, with the weights that the router gives them."""
        assignment = weighed(assignment, scores_TE, self.renormalize, self.zero_slots, self.weight_scale)
        double = assignment.weight_P.dtype == torch.float64
        return replace(assignment, weight_P=assignment.weight_P.float()) if double else assignment

    def _assigned(
        self, rule: Selection, choice_BSE: Tensor, scores_BSE: Tensor, allowed_BSE: Tensor | None
    ) -> Assignment:
        """The pairs that the rule chooses, with their final weights."""
        if not self.training and isinstance(self.renormalize, bool):
            few = few_pairs(
                rule,
                choice_BSE,
                scores_BSE,
                allowed_BSE,
                renormalize=self.renormalize,
                weight_scale=self.weight_scale,
            )
            if few is not None:
                return few
        return self.weighted(rule(choice_BSE, scores_BSE, allowed_BSE), scores_BSE.flatten(0, 1))

    def _choice(self, logits_BSE: Tensor, scores_BSE: Tensor, context: Context) -> Tensor:
        by_logits = self.select.chooses_by == "logits" or self.price_momentum is not None
        choice_BSE = logits_BSE if by_logits else scores_BSE
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

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, score={self.score}, select={self.select}"
