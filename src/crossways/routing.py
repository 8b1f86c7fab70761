"""What a router may look at (`Context`) and what it says (`Routing`).

Legend: B batch, S sequence, T = B * S tokens, E experts, P pairs, C cutoffs (1 or E).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from crossways.assignment import Assignment
from crossways.errors import UserError


@dataclass(frozen=True)
class GateNoise:
    """The noise in a gate's logits, which are `clean` plus standard normal draws times `scale`."""

    clean: Tensor
    """Logits without noise, float32, shaped as the logits."""
    scale: Tensor
    """Standard deviation, float32 above 0, shaped as the logits."""

    def flatten(self) -> GateNoise:
        """From (B, S, E) to (T, E)."""
        return GateNoise(self.clean.flatten(0, 1), self.scale.flatten(0, 1))


@dataclass(frozen=True)
class Routing:
    """What one router decided for one batch."""

    logits_TE: Tensor
    """Raw router logits, float32 (T, E), or float64 where the router is told to."""
    scores_TE: Tensor
    """Scores (T, E), in the dtype of the logits."""
    assignment: Assignment
    """The pairs that are executed."""
    choice_TE: Tensor | None = None
    """What the selection compared, float32 (T, E) without gradient: the scores, biased where balancing adds a
    bias."""
    valid_T: Tensor | None = None
    """Boolean (T,), false for padding; None when there is none."""
    cutoff_C: Tensor | None = None
    """The threshold that would have spent the same budget on this batch, for rules whose decode twin needs it."""
    normaliser_E: Tensor | None = None
    """What the decode twin of a score that looks at other tokens would have to know of this batch."""
    sparsity_coef: Tensor | None = None
    """Weight of the sparsity loss for this batch, scalar, for routers that adapt it."""
    num_rows: int = 1
    """B; tokens are row-major, so row b owns tokens b S to (b + 1) S - 1."""
    state: Tensor | None = None
    """What a recurrent gate hands to the next layer, (B, S, any)."""
    reused: bool = False
    """Whether an earlier layer made this decision; its losses are then counted there."""
    gate_loss: Tensor | None = None
    """What a gate that trains itself adds to the training loss, float32 scalar; None for all others."""
    fixed: bool = False
    """Whether the gate no longer learns whom to choose; a balance loss could then only spoil the weights."""
    noise: GateNoise | None = None
    """The noise in the logits, (T, E), for a gate that adds some; None otherwise."""
    cosine_TE: Tensor | None = None
    """In training, the cosines that the logits of a cosine gate are, before its temperature and any perturbation, (T,
    E); None for all other gates."""
    asked: Assignment | None = None
    """In training, what would be executed if nobody were dropped, for rules that drop; None for all others."""
    earlier_load_E: Tensor | None = None
    """Executed pairs per expert in earlier passes of the same optimizer step, float32 (E,); None in its first."""
    gathered_load_E: Tensor | None = None
    """Executed pairs per expert of this pass and the earlier ones of its optimizer step, of all processes together,
    float32 (E,); None where nobody asked for it."""

    def density(self) -> Tensor:
        """Executed pairs over all pairs of valid tokens, scalar float32 in [0, 1]; NaN for padding alone."""
        tokens, num_experts = self.scores_TE.shape
        executed = self.assignment.offsets_E1[-1].float()
        return executed / ((tokens if self.valid_T is None else self.valid_T.sum()) * num_experts)


@dataclass(frozen=True)
class GateOutput:
    """What a gate says, for gates that say more than logits. All of (B, S, ...)."""

    logits_BSE: Tensor
    """Router logits, float32 (B, S, E); their scores are the weights of the chosen pairs."""
    choice_BSE: Tensor | None = None
    """Logits to choose by, where they are not those to weigh by; float32 (B, S, E), no gradient."""
    state: Tensor | None = None
    """What a recurrent gate wants back in the next layer, as `context.previous.state`; (B, S, any)."""
    loss: Tensor | None = None
    """What to add to the training loss, float32 scalar."""
    fixed: bool = False
    """Whether the choice is no longer learnt."""
    noise: GateNoise | None = None
    """The noise in the logits, (B, S, E); None where there is none."""
    cosine_BSE: Tensor | None = None
    """The cosines that the logits are, times a factor; None where they are none, and outside training."""


@dataclass(frozen=True, eq=False)
class Decided:
    """Pairs that were decided elsewhere, to be executed again."""

    token_P: Tensor
    """Token of each pair, int32 (P,), row-major."""
    expert_P: Tensor
    """Its expert, int16 (P,)."""
    rows: int
    """B."""
    length: int
    """S."""

    def among(self, scores_BSE: Tensor, allowed_BSE: Tensor | None) -> Assignment:
        """These pairs, as far as they are allowed, weighing what they score now.

        Raises:
            UserError: for a batch of another shape.
        """
        if tuple(scores_BSE.shape[:2]) != (self.rows, self.length):
            raise UserError(
                f"decisions were recorded for a batch of shape {(self.rows, self.length)}, this one is "
                f"{tuple(scores_BSE.shape[:2])}"
            )
        token_P, expert_P = (index_P.to(scores_BSE.device).long() for index_P in (self.token_P, self.expert_P))
        scores_TE = scores_BSE.flatten(0, 1)
        mask_TE = torch.zeros_like(scores_TE, dtype=torch.bool)
        mask_TE[token_P, expert_P] = True
        if allowed_BSE is not None:
            mask_TE &= allowed_BSE.flatten(0, 1)
        return Assignment.from_mask(mask_TE, scores_TE, most=len(token_P))


@dataclass(frozen=True)
class Context:
    """What a router may look at beside its input. The model fills it in; a layer by itself does with the default."""

    gate: nn.Module | None = None
    """The shared gate, for a router that owns none."""
    valid_BS: Tensor | None = None
    """Boolean (B, S), false for padding, which chooses nobody and competes for nothing. None is all true."""
    causal: bool = False
    """Decide by the selection's decode twin."""
    token_ids_BS: Tensor | None = None
    """Token ids (B, S), for gates that hash them; None when the model was given embeddings."""
    layer: int = 0
    """Position of the router's layer among those that share its gate, 0 first."""
    step: int = 0
    """Steps of training before this one, for gates and selections that change in its course: what the model counts,
    optimizer steps under our trainer. A number and not a tensor, so that recomputation under gradient checkpointing
    sees the one of its forward pass."""
    previous: Routing | None = None
    """What the same factor's router decided in the routed layer before."""
    reuse: bool = False
    """Execute `previous` again instead of deciding."""
    cutoff_C: Tensor | None = None
    """The cutoff to decide by; None is the running estimate. The model passes copies of this and of `bias_E`, taken
    before they are updated, because gradient checkpointing decides again afterwards."""
    normaliser_E: Tensor | None = None
    """The normaliser of the score's decode twin to decide by; None is the running estimate. Copied likewise."""
    bias_E: Tensor | None = None
    """The load-balancing bias to decide by; None is the current one."""
    decided: Decided | None = None
    """What to execute, weighed anew, instead of what the selection would choose. Here and not in the router, so that
    recomputation under gradient checkpointing executes it again."""


Decide = Callable[[Tensor, Tensor | None], Routing]
Replay = Callable[[Tensor | None], Sequence[Decided]]
"""Gets the token ids (B, S) of a forward pass, if there are any, and says what each router is to execute in it."""
Perturbation = Callable[[Tensor, Tensor | None, Decide], Routing]
"""What if: gets the logits (B, S, E), the allowed pairs (or None) and the decision, and returns another one."""
