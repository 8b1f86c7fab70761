"""The causal language model, native to transformers.

Legend: B batch, S sequence, R routers, V vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.utils import can_return_tuple

from crossways.models.backbone import CrosswaysModel
from crossways.models.configuration import CrosswaysConfig
from crossways.models.losses import auxiliary_losses, share_of_step
from crossways.models.outputs import RoutedCausalLMOutput
from crossways.models.pretrained import CrosswaysPreTrainedModel

__all__ = ["CrosswaysForCausalLM", "CrosswaysModel", "CrosswaysPreTrainedModel"]


class CrosswaysForCausalLM(CrosswaysPreTrainedModel, GenerationMixin):
    """`CrosswaysModel` with a language-model head; `generate` routes by the decode twin of every selection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CrosswaysConfig) -> None:
        super().__init__(config)
        self.model = CrosswaysModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_routings: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        causal_routing: bool | None = None,
        **kwargs: Any,
    ) -> RoutedCausalLMOutput:
        """As `LlamaForCausalLM.forward`.

        Args:
            labels: (B, S) token ids, -100 where no loss is taken; the model shifts them.
            output_routings: also return every router's `Routing`.
            num_items_in_batch: labels in the whole optimizer step, when this batch is one of several accumulated.
            causal_routing: as for `CrosswaysModel.forward`; `generate` passes it on, and sets it unless given.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            causal_routing=causal_routing,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BSV = self.lm_head(outputs.last_hidden_state[:, keep, :])
        routings = outputs.routings
        loss = lm_loss = aux = None
        if labels is not None:
            lm_loss = self.loss_function(
                logits=logits_BSV,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
            )
            aux, weighted = auxiliary_losses(routings, self.config)
            loss = lm_loss + weighted * share_of_step(labels, num_items_in_batch)
        return RoutedCausalLMOutput(
            loss=loss,
            logits=logits_BSV,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            aux_losses=aux,
            expert_load=tuple(routing.assignment.load_E() for routing in routings),
            routings=routings if output_routings else None,
        )

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in transformers; routing is causal unless `causal_routing=False` is asked for explicitly."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        inputs.setdefault("causal_routing", True)
        return inputs
