"""What the model returns beside transformers' usual fields.

Legend: R routers (layer by layer, factor by factor), E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from crossways.routing import Routing


@dataclass
class RoutedModelOutput(BaseModelOutputWithPast):
    """Output of `CrosswaysModel`."""

    routings: tuple[Routing, ...] | None = None
    """What each of the R routers decided."""


@dataclass
class RoutedCausalLMOutput(CausalLMOutputWithPast):
    """Output of `CrosswaysForCausalLM`; `loss` is the language-model loss plus the weighted auxiliary losses."""

    lm_loss: Tensor | None = None
    """Cross-entropy alone, nats per token, scalar."""
    aux_losses: dict[str, Tensor] | None = None
    """Unweighted auxiliary losses by name (those of `crossways.models.losses.AUXILIARY_LOSSES` that are in use), one
    number for each router that has one; only while labels are given."""
    expert_load: tuple[Tensor, ...] | None = None
    """Executed pairs per expert, int64 (E,), for each router."""
    routings: tuple[Routing, ...] | None = None
    """What each router decided, if `output_routings=True` was passed."""
