"""The decoder: embeddings, layers and the gates that they share.

Legend: B batch, S sequence, D model width, R routers.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import repeat
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from crossways.gates import Gate, build_gate
from crossways.models.configuration import CrosswaysConfig
from crossways.models.decoder import CrosswaysDecoderLayer, build_router
from crossways.models.outputs import RoutedModelOutput
from crossways.models.pretrained import CrosswaysPreTrainedModel
from crossways.models.repeated import CacheFrom, RepeatedRouter
from crossways.router import Router
from crossways.routing import Context, Replay, Routing


def _repeated_routers(config: CrosswaysConfig) -> nn.ModuleList:
    return nn.ModuleList(RepeatedRouter(build_router(config), factor) for factor in range(config.factors))


class CrosswaysModel(CrosswaysPreTrainedModel):
    """Decoder without a language-model head. It owns the gates, so layers that share one hold no copy of it.

    With `distinct_layers` it holds that many and goes through them several times; `repeats` holds the routers of all
    rounds but the first.

    Where a gate or the selection is scheduled, the buffer `training_passes` counts the forward passes in training
    mode with gradients, or optimizer steps while `crossways.training.steps.OptimizerSteps` sees to it; it is part of
    the checkpoint.
    """

    training_passes: Tensor
    replay: Replay | None
    """Says what to execute in the next pass, while decisions are replayed (`crossways.replay`)."""
    pass_is_step: bool
    """Whether a training pass is an optimizer step by itself; otherwise `finish_step` says when one ends."""

    def __init__(self, config: CrosswaysConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        distinct = config.num_hidden_layers // config.rounds
        self.layers = nn.ModuleList(CrosswaysDecoderLayer(config, i) for i in range(distinct))
        if config.rounds > 1:
            self.repeats = nn.ModuleDict(
                {str(index): _repeated_routers(config) for index in config.routed_layers if index >= distinct}
            )
        self.gate_plan = dict(zip(config.routed_layers, config.gate_plan, strict=True))
        gate = build_gate(config.gate)
        users = config.sharing_plan.deciding(len(config.routed_layers))
        self.gates = nn.ModuleList(
            gate.build(config.hidden_size, config.router_size, num_layers, config.vocab_size)
            for num_layers in users
            for _ in range(config.factors)
        )
        if config.scheduled:
            self.register_buffer("training_passes", torch.zeros((), dtype=torch.long))
        self.pass_is_step = True
        self.replay = None
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def routers(self) -> list[Router]:
        """All R routers, layer by layer and factor by factor, in the order of `routings`."""
        return [router for index in self.config.routed_layers for router in self._routers_of(index)]

    def _routers_of(self, index: int) -> tuple[Router, ...]:
        """Those that decide where the pass is at its layer `index`, 0 to `num_hidden_layers` - 1."""
        if index < len(self.layers):
            return cast(CrosswaysDecoderLayer, self.layers[index]).routers
        repeated = cast(nn.ModuleList, self.repeats[str(index)]) if str(index) in self.repeats else ()
        return tuple(cast(RepeatedRouter, holder).router for holder in repeated)

    def _cache_at(self, index: int, cache: Cache | None) -> Cache | None:
        """What the layer at this index of the pass is to take for the cache."""
        first = index - index % len(self.layers)
        return cast(Cache, CacheFrom(cache, first)) if first and cache is not None else cache

    def count_tokens(self, counts_V: Tensor) -> None:
        """Tell every gate how often each token id occurs in the training text, int64 (V,). Needed once, before the
        first step, by gates whose specification says `counts_tokens`; part of the checkpoint afterwards."""
        for gate in self.gates:
            cast(Gate, gate).count_tokens(counts_V)

    def _contexts(
        self, valid_BS: Tensor | None, token_ids_BS: Tensor | None, causal: bool
    ) -> dict[int, list[Context]]:
        """For each routed layer, what its routers may look at, but for what earlier layers will decide."""
        sharing = self.config.sharing_plan
        step = int(self.training_passes) if self.config.scheduled else 0
        contexts: dict[int, list[Context]] = {}
        replayed = iter(self.replay(token_ids_BS)) if self.replay else repeat(None)
        for position, (index, gates) in enumerate(self.gate_plan.items()):
            routers = self._routers_of(index)
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
                    decided=decided,
                )
                for gate, router, decided in zip(gates, routers, replayed, strict=False)
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
        for index in range(self.config.num_hidden_layers):
            layer = cast(CrosswaysDecoderLayer, self.layers[index % len(self.layers)])
            hidden_states, decided = layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=self._cache_at(index, past_key_values),
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                routers=self._routers_of(index),
                contexts=[
                    replace(context, previous=before)
                    for context, before in zip(contexts.get(index, ()), previous, strict=False)
                ],
                **kwargs,
            )
            routings, previous = routings + decided, decided or previous
        if self.training and torch.is_grad_enabled():  # sampling from a model in training mode teaches it nothing
            if self.config.load_balance_scope == "global":
                routings = self._gathered(routings)
            self._observe(routings)
        return RoutedModelOutput(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values, routings=routings
        )

    def _gathered(self, routings: tuple[Routing, ...]) -> tuple[Routing, ...]:
        """With the loads of all processes, for the balance loss; one exchange for all routers."""
        if not routings:
            return routings
        loads = [r.assignment.load_E() + (0.0 if r.earlier_load_E is None else r.earlier_load_E) for r in routings]
        summed = self.routers[0].processes.sum(torch.cat(loads).float()).split([len(load_E) for load_E in loads])
        return tuple(replace(r, gathered_load_E=load_E) for r, load_E in zip(routings, summed, strict=True))

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
