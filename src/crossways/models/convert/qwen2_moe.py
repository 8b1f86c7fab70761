"""Qwen2-MoE: any layers routed, a shared expert that the token weights by a sigmoid.

Legend: D model width, F width of the shared expert, H rows of its first matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from crossways.errors import UserError
from crossways.models.configuration import CrosswaysConfig
from crossways.models.convert.fields import common_fields, dense_layers, hidden_act, placed, routing
from crossways.models.convert.refusals import refused, token_choice_k
from crossways.models.convert.weights import Weights, filled, layer_name, with_gates_in_model, with_gates_per_layer
from crossways.models.modeling import CrosswaysForCausalLM


def to_qwen2_moe(model: CrosswaysForCausalLM) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE with the weights and logits of `model`.

    The family multiplies its shared expert by sigmoid(w x). Where ours is not gated, w = 0 makes that one half, which
    doubling the shared expert's second matrix undoes exactly. The family's balance loss is another one and is off.

    Raises:
        UserError: naming what the family cannot express.
    """
    config, k = model.config, token_choice_k(model, "Qwen2-MoE")
    ours = model.state_dict()
    biased, layers = config.attention_bias, range(config.num_hidden_layers)
    if biased and any(bool(ours[f"{layer_name(layer)}self_attn.o_proj.bias"].any()) for layer in layers):
        raise refused("Qwen2-MoE", "the attention output has a bias that is not zero")
    routed = set(config.routed_layers)
    theirs = Qwen2MoeConfig(
        **common_fields(config),
        hidden_act=hidden_act(config, "Qwen2-MoE", dense=len(routed) < config.num_hidden_layers),
        intermediate_size=config.intermediate_size,
        decoder_sparse_step=max(config.moe_every, 1),
        mlp_only_layers=dense_layers(config),
        moe_intermediate_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=max(config.shared_expert_intermediate_size, 1),
        num_experts_per_tok=k,
        num_experts=config.num_experts,
        norm_topk_prob=bool(config.renormalize),
        router_aux_loss_coef=0.0,
        qkv_bias=biased,
    )
    weights = with_gates_per_layer(ours, config)
    for layer in layers:
        weights.pop(f"{layer_name(layer)}self_attn.o_proj.bias", None)
        if layer in routed:
            _split_shared_expert(weights, f"{layer_name(layer)}mlp.", config, ours["model.embed_tokens.weight"])
    return filled(Qwen2MoeForCausalLM, theirs, weights, model)


def from_qwen2_moe(model: Qwen2MoeForCausalLM) -> CrosswaysForCausalLM:
    """Our model with the weights and logits of a Qwen2-MoE.

    Raises:
        UserError: if it uses sliding windows, which ours lacks.
    """
    theirs = model.config
    if "sliding_attention" in (theirs.layer_types or ()):
        raise UserError("this Qwen2-MoE uses sliding-window attention, which crossways models do not have")
    routed = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    weights = dict(model.state_dict())
    mlps = [f"{layer_name(layer)}mlp." for layer, is_routed in enumerate(routed) if is_routed]
    gated = any(bool(weights[f"{mlp}shared_expert_gate.weight"].any()) for mlp in mlps)
    shared = any(bool(weights[f"{mlp}shared_expert.down_proj.weight"].any()) for mlp in mlps)
    for mlp in mlps:
        if shared:
            _join_shared_expert(weights, mlp, gated)
        else:
            _drop_shared_expert(weights, mlp)
    for layer in range(len(routed)):
        if theirs.qkv_bias:
            weights[f"{layer_name(layer)}self_attn.o_proj.bias"] = weights["model.embed_tokens.weight"].new_zeros(
                theirs.hidden_size
            )
    config = CrosswaysConfig(
        **common_fields(theirs),
        **routing(theirs.hidden_act, theirs.num_experts_per_tok, theirs.norm_topk_prob),
        attention_bias=theirs.qkv_bias,
        intermediate_size=theirs.intermediate_size,
        **placed(routed, theirs.decoder_sparse_step),
        num_experts=theirs.num_experts,
        moe_intermediate_size=theirs.moe_intermediate_size,
        shared_expert_intermediate_size=theirs.shared_expert_intermediate_size if shared else 0,
        shared_expert_gate=gated and shared,
    )
    return filled(CrosswaysForCausalLM, config, with_gates_in_model(weights, config), model)


def _split_shared_expert(weights: Weights, mlp: str, config: CrosswaysConfig, like: Tensor) -> None:
    """Replace our shared expert by the family's, in place; a zero expert of width 1 stands for none. The family's
    gate is always there: zero makes it one half, which the second matrix takes back."""
    width = like.shape[1]
    up_HD = weights.pop(f"{mlp}shared_expert.up_proj.weight", like.new_zeros(2, width))
    down_DF = weights.pop(f"{mlp}shared_expert.down_proj.weight", like.new_zeros(width, 1))
    gate_1D = weights.pop(f"{mlp}shared_expert.gate.weight", None)
    scale = config.shared_expert_scale * (2 if gate_1D is None else 1)
    gate_FD, up_FD = up_HD.chunk(2)
    weights[f"{mlp}shared_expert.gate_proj.weight"] = gate_FD
    weights[f"{mlp}shared_expert.up_proj.weight"] = up_FD
    weights[f"{mlp}shared_expert.down_proj.weight"] = scale * down_DF
    weights[f"{mlp}shared_expert_gate.weight"] = like.new_zeros(1, width) if gate_1D is None else gate_1D


def _join_shared_expert(weights: Weights, mlp: str, gated: bool) -> None:
    """Replace the family's shared expert by ours, in place, with its gate or with the half that a gate of zero is."""
    gate_1D = weights.pop(f"{mlp}shared_expert_gate.weight")
    part = {name: weights.pop(f"{mlp}shared_expert.{name}_proj.weight") for name in ("gate", "up", "down")}
    weights[f"{mlp}shared_expert.up_proj.weight"] = torch.cat([part["gate"], part["up"]])
    weights[f"{mlp}shared_expert.down_proj.weight"] = part["down"] if gated else part["down"] / 2
    if gated:
        weights[f"{mlp}shared_expert.gate.weight"] = gate_1D


def _drop_shared_expert(weights: Weights, mlp: str) -> None:
    """Leave out a shared expert that adds nothing, in place."""
    for name in ("shared_expert_gate", *(f"shared_expert.{name}_proj" for name in ("gate", "up", "down"))):
        del weights[f"{mlp}{name}.weight"]
