"""One decoder layer: transformers' Llama attention and norms around a dense or a routed feed-forward.

Legend: B batch, S sequence, D model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from crossways.experts.module import Experts
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.layers import CartesianMoE, Latent, MoE, SharedExpert
from crossways.models.configuration import CrosswaysConfig
from crossways.models.routed_attention import RoutedAttention, RoutedNormedAttention
from crossways.router import Router, Sparsity
from crossways.routing import Context, Routing
from crossways.rules.score import build_score
from crossways.rules.select import build_selection


def build_router(config: CrosswaysConfig) -> Router:
    """A router with the configuration's rules, without a gate."""
    sparsity = None
    if config.sparsity_budget:
        target = config.sparsity_budget / config.router_size
        sparsity = Sparsity(target, config.sparsity_coef_start, config.sparsity_coef_growth)
    return Router(
        config.router_size,
        build_score(config.score),
        build_selection(config.select or "top_k"),
        renormalize=config.renormalize,
        weight_scale=config.weight_scale,
        zero_slots=config.zero_slots,
        logit_offsets=config.logit_offsets,
        cutoff_momentum=config.cutoff_momentum,
        bias_update_rate=config.bias_update_rate,
        expert_dropout=config.expert_dropout,
        input_jitter=config.router_jitter,
        input_dropout=config.router_dropout,
        price_momentum=config.quantile_momentum if config.quantile_balancing else None,
        sparsity=sparsity,
        dtype=getattr(torch, config.router_dtype),
    )


def build_moe(config: CrosswaysConfig) -> MoE:
    """One routed (sub-)layer with the configuration's experts and rules; its gate is given at call time."""
    router = build_router(config)
    experts = Experts(
        config.num_experts,
        config.moe_latent_size or config.hidden_size,
        config.moe_intermediate_size,
        config.expert_activation,
        config.experts_backend,
        config.expert_bias,
    )
    latent = Latent(config.hidden_size, config.moe_latent_size) if config.moe_latent_size else None
    shared_width = config.shared_expert_intermediate_size
    shared = None
    if shared_width:
        shared = SharedExpert(
            config.hidden_size,
            shared_width,
            config.expert_activation,
            config.shared_expert_scale,
            config.shared_expert_gate,
        )
    cheap = None
    if config.zero_computation_experts:
        numbers = config.zero_experts, config.copy_experts, config.constant_experts
        cheap = ZeroComputationExperts(config.hidden_size, *numbers)
    return MoE(
        router,
        experts,
        shared,
        cheap,
        config.negated_experts,
        latent,
        config.weights_on,  # type: ignore[arg-type]
    )


def build_routed_layer(config: CrosswaysConfig) -> MoE | CartesianMoE:
    """The routed layer of the configured kind."""
    if config.layer == "moe":
        return build_moe(config)
    norms = [LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(config.factors - 1)]
    factors = [build_moe(config) for _ in range(config.factors)]
    return CartesianMoE(factors, norms, config.cartesian_skip, config.router_input)  # type: ignore[arg-type]


def build_attention(config: CrosswaysConfig, layer_idx: int) -> nn.Module:
    """The attention of the configured kind. Qwen3's is Llama's with two norms."""
    plain, routed = (Qwen3Attention, RoutedNormedAttention) if config.qk_norm else (LlamaAttention, RoutedAttention)
    attention: Any = routed if config.attention_experts else plain
    return attention(config, layer_idx)


class CrosswaysDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm attention and feed-forward, as in LLaMA; also returns what its routers decided."""

    def __init__(self, config: CrosswaysConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = build_attention(config, layer_idx)
        self.is_routed = layer_idx in config.routed_layers
        self.mlp = build_routed_layer(config) if self.is_routed else LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @property
    def routers(self) -> tuple[Router, ...]:
        """The routers of this layer; none in a dense one."""
        return self.mlp.routers if isinstance(self.mlp, MoE | CartesianMoE) else ()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        contexts: Sequence[Context] = (),
        routers: Sequence[Router] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """As `LlamaDecoderLayer.forward`, plus what each of the layer's routers may look at beside its input, and the
        routers that decide instead of its own. Returns the hidden states (B, S, D) and the routings."""
        attended_BSD, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        residual_BSD = hidden_states + attended_BSD
        x_BSD = self.post_attention_layernorm(residual_BSD)
        if not self.is_routed:
            return residual_BSD + self.mlp(x_BSD), ()
        y_BSD, routings = self.mlp(x_BSD, residual_BSD, contexts, routers=routers)
        return residual_BSD + y_BSD, routings
