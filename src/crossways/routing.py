"""What a router may look at (`Context`) and what it says (`Routing`).

Legend: B batch, S sequence, T = B * S tokens, E experts, C cutoffs (1 or E).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from crossways.assignment import Assignment


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
    state: Tensor | None = None
    """What a recurrent gate hands to the next layer, (B, S, any)."""
    reused: bool = False
    """Whether an earlier layer made this decision; its losses are then counted there."""


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
    previous: Routing | None = None
    """What the same factor's router decided in the routed layer before."""
    reuse: bool = False
    """Execute `previous` again instead of deciding."""
    cutoff_C: Tensor | None = None
    """The cutoff to decide by; None is the running estimate. The model passes copies of this and of `bias_E`, taken
    before they are updated, because gradient checkpointing decides again afterwards."""
    bias_E: Tensor | None = None
    """The load-balancing bias to decide by; None is the current one."""


Decide = Callable[[Tensor, Tensor | None], Routing]
Perturbation = Callable[[Tensor, Tensor | None, Decide], Routing]
"""What if: gets the logits (B, S, E), the allowed pairs (or None) and the decision, and returns another one."""
