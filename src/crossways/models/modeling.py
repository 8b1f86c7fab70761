"""The causal language model, native to transformers.

Legend: B batch, S sequence, D model width, R routers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from crossways.errors import UserError
from crossways.experts.module import Experts
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.gates import Gate, build_gate
from crossways.models.configuration import CrosswaysConfig
from crossways.models.decoder import CrosswaysDecoderLayer
from crossways.models.losses import auxiliary_losses, share_of_step
from crossways.models.outputs import RoutedCausalLMOutput, RoutedModelOutput
from crossways.router import Router
from crossways.routing import Context, Routing
from crossways.sharing import build_sharing


class CrosswaysPreTrainedModel(LlamaPreTrainedModel):
    """Initialisation, and what transformers must know to save, load and record."""

    config_class = CrosswaysConfig
    config: CrosswaysConfig
    _no_split_modules = ["CrosswaysDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["cutoff", "normaliser", "router.bias", "sparsity_coef"]  # noqa: RUF012
    _can_compile_fullgraph = False  # ragged assignments have data-dependent shapes
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CrosswaysDecoderLayer,
        "attentions": LlamaAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts | ZeroComputationExperts):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Gate):
            module.reset_parameters(self.config.router_initializer_range or self.config.initializer_range)
        elif isinstance(module, CrosswaysModel) and module.config.scheduled:
            init.zeros_(module.training_passes)
        elif isinstance(module, Router):
            for name, buffer in module.named_buffers(recurse=False):
                init.constant_(buffer, module.initial(name))

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """As in transformers, but reentrant checkpointing is refused: it cuts the auxiliary losses off their
        gradient without a word, since it only follows tensors that a layer returns by themselves."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get(
            "use_reentrant", True
        ):  # torch's default
            raise UserError("gradient checkpointing needs use_reentrant=False; the other kind loses auxiliary losses")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing to do: the configuration's `save_pretrained` already says where these classes are. Transformers
        would copy our source file into every directory saved after loading one with `trust_remote_code`."""


class CrosswaysModel(CrosswaysPreTrainedModel):
    """Decoder without a language-model head. It owns the gates, so layers that share one hold no copy of it.

    Where a gate or the selection is scheduled, the buffer `training_passes` counts the forward passes in training
    mode with gradients, or optimizer steps while `crossways.training.steps.OptimizerSteps` sees to it; it is part of
    the checkpoint.
    """

    training_passes: Tensor
    pass_is_step: bool
    """Whether a training pass is an optimizer step by itself; otherwise `finish_step` says when one ends."""

    def __init__(self, config: CrosswaysConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(CrosswaysDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gate_plan = dict(zip(config.moe_layers, config.gate_plan, strict=True))
        gate = build_gate(config.gate)
        users = build_sharing(config.sharing).deciding(len(config.moe_layers))
        self.gates = nn.ModuleList(
            gate.build(config.hidden_size, config.router_size, num_layers, config.vocab_size)
            for num_layers in users
            for _ in range(config.factors)
        )
        if config.scheduled:
            self.register_buffer("training_passes", torch.zeros((), dtype=torch.long))
        self.pass_is_step = True
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def routers(self) -> list[Router]:
        """All R routers, layer by layer and factor by factor, in the order of `routings`."""
        return [router for layer in self.layers for router in cast(CrosswaysDecoderLayer, layer).routers]

    def count_tokens(self, counts_V: Tensor) -> None:
        """Tell every gate how often each token id occurs in the training text, int64 (V,). Needed once, before the
        first step, by gates whose specification says `counts_tokens`; part of the checkpoint afterwards."""
        for gate in self.gates:
            cast(Gate, gate).count_tokens(counts_V)

    def _contexts(
        self, valid_BS: Tensor | None, token_ids_BS: Tensor | None, causal: bool
    ) -> dict[int, list[Context]]:
        """For each routed layer, what its routers may look at, but for what earlier layers will decide."""
        sharing = build_sharing(self.config.sharing)
        step = int(self.training_passes) if self.config.scheduled else 0
        contexts = {}
        for position, (index, gates) in enumerate(self.gate_plan.items()):
            routers = cast(CrosswaysDecoderLayer, self.layers[index]).routers
            contexts[index] = [
                Context(
                    gate=self.gates[gate],
                    valid_BS=valid_BS,
                    causal=causal,
                    token_ids_BS=token_ids_BS,
                    layer=sharing.position(position),
                    step=step,
                    reuse=sharing.reuses_decision(position),
                    cutoff_C=router.snapshot("cutoff"),
                    normaliser_E=router.snapshot("normaliser"),
                    bias_E=router.snapshot("bias"),
                )
                for gate, router in zip(gates, routers, strict=True)
            ]
        return contexts

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        causal_routing: bool | None = None,
        **kwargs: Any,
    ) -> RoutedModelOutput:
        """As `LlamaModel.forward`.

        Args:
            attention_mask: (B, S) with zeros at padding, which then takes no part in routing. Other forms of mask
                only reach attention.
            causal_routing: route by each selection's decode twin; default `config.causal_routing`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        length = hidden_states.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            start = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(start, start + length, device=hidden_states.device)[None]
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        valid_BS = None
        if attention_mask is not None and attention_mask.dim() == 2:
            valid_BS = attention_mask[:, -length:].bool()
        contexts = self._contexts(
            valid_BS, input_ids, self.config.causal_routing if causal_routing is None else causal_routing
        )
        routings: tuple[Routing, ...] = ()
        previous: tuple[Routing | None, ...] = (None,) * self.config.factors
        for index, module in enumerate(self.layers):
            layer = cast(CrosswaysDecoderLayer, module)
            hidden_states, decided = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                contexts=[
                    replace(context, previous=before)
                    for context, before in zip(contexts.get(index, ()), previous, strict=False)
                ],
                **kwargs,
            )
            routings, previous = routings + decided, decided or previous
        if self.training and torch.is_grad_enabled():  # sampling from a model in training mode teaches it nothing
            self._observe(routings)
        return RoutedModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values, routings=routings
        )

    def _observe(self, routings: tuple[Routing, ...]) -> None:
        """Let the routers learn what is not learnt by gradients."""
        decided = [routing.density() for routing in routings if not routing.reused]
        density = torch.stack(decided).mean() if decided and self.config.sparsity_budget else None
        for router, routing in zip(self.routers, routings, strict=True):
            router.observe(routing, density, step_ends=False)
        if self.pass_is_step:
            self.finish_step()

    def finish_step(self) -> None:
        """An optimizer step is over: routers move what balances them, schedules advance."""
        for router in self.routers:
            router.finish_step()
        if self.config.scheduled:
            self.training_passes += 1


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
