"""To and from Hugging Face's own families: Qwen2-MoE and Mixtral, with the same logits.

Weights are renamed, never retrained: the attention, the norms and the stacked experts have the same layout on both
sides. What a family cannot express is refused with the reason; nothing is dropped. A gate that layers share becomes
one equal copy per layer, so an exported PathMoE model computes the same but no longer ties its gates. Parity is up to
rounding in float32; in lower precision the families compute router logits in the model's dtype, ours in float32.

Legend: D model width, F expert width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from crossways.errors import UserError
from crossways.experts.activation import Activation
from crossways.gates import Linear, build_gate
from crossways.models.configuration import CrosswaysConfig
from crossways.models.modeling import CrosswaysForCausalLM
from crossways.rules.score import Score, Softmax, Unified, build_score
from crossways.rules.select import TopK, build_selection

Weights = dict[str, Tensor]

COMMON_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
    "dtype",
)
"""Fields that mean the same in LLaMA, Qwen2-MoE and Mixtral."""
HIDDEN_ACTS = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}
"""The families' `hidden_act` of each gated activation."""


def to_qwen2_moe(model: CrosswaysForCausalLM) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE with the weights and logits of `model`.

    The family multiplies its shared expert by sigmoid(w x); w = 0 makes that one half, which doubling the shared
    expert's second matrix undoes exactly. The family's balance loss is another one and is switched off.

    Raises:
        UserError: naming what the family cannot express.
    """
    config, k = model.config, _token_choice_k(model, "Qwen2-MoE")
    ours = model.state_dict()
    biased = config.attention_bias
    if biased and any(bool(ours[f"{_layer(i)}self_attn.o_proj.bias"].any()) for i in range(config.num_hidden_layers)):
        raise _refused("Qwen2-MoE", "the attention output has a bias that is not zero")
    routed = set(config.routed_layers)
    theirs = Qwen2MoeConfig(
        **common_fields(config),
        hidden_act=_hidden_act(config, "Qwen2-MoE", dense=len(routed) < config.num_hidden_layers),
        intermediate_size=config.intermediate_size,
        decoder_sparse_step=max(config.moe_every, 1),
        mlp_only_layers=_dense_layers(config),
        moe_intermediate_size=config.moe_intermediate_size,
        shared_expert_intermediate_size=max(config.shared_expert_intermediate_size, 1),
        num_experts_per_tok=k,
        num_experts=config.num_experts,
        norm_topk_prob=bool(config.renormalize),
        router_aux_loss_coef=0.0,
        qkv_bias=biased,
    )
    weights = _with_gates_per_layer(ours, config)
    for layer in range(config.num_hidden_layers):
        weights.pop(f"{_layer(layer)}self_attn.o_proj.bias", None)
        if layer in routed:
            _split_shared_expert(weights, f"{_layer(layer)}mlp.", ours["model.embed_tokens.weight"])
    return _filled(Qwen2MoeForCausalLM, theirs, weights, model)


def from_qwen2_moe(model: Qwen2MoeForCausalLM) -> CrosswaysForCausalLM:
    """Our model with the weights and logits of a Qwen2-MoE.

    Raises:
        UserError: if it uses what ours lacks: sliding windows, or a shared expert that is gated by the token (a
            `shared_expert_gate` other than zero).
    """
    theirs = model.config
    if "sliding_attention" in (theirs.layer_types or ()):
        raise UserError("this Qwen2-MoE uses sliding-window attention, which crossways models do not have")
    routed = [hasattr(layer.mlp, "experts") for layer in model.model.layers]
    weights = dict(model.state_dict())
    shared = 0
    for layer, is_routed in enumerate(routed):
        if is_routed:
            shared = _join_shared_expert(weights, f"{_layer(layer)}mlp.")
        if theirs.qkv_bias:
            weights[f"{_layer(layer)}self_attn.o_proj.bias"] = weights["model.embed_tokens.weight"].new_zeros(
                theirs.hidden_size
            )
    config = CrosswaysConfig(
        **common_fields(theirs),
        **_routing(theirs.hidden_act, theirs.num_experts_per_tok, theirs.norm_topk_prob),
        attention_bias=theirs.qkv_bias,
        intermediate_size=theirs.intermediate_size,
        **_placed(routed, theirs.decoder_sparse_step),
        num_experts=theirs.num_experts,
        moe_intermediate_size=theirs.moe_intermediate_size,
        shared_expert_intermediate_size=shared,
    )
    return _filled(CrosswaysForCausalLM, config, _with_gates_in_model(weights, config), model)


def to_mixtral(model: CrosswaysForCausalLM) -> MixtralForCausalLM:
    """A Mixtral with the weights and logits of `model`.

    Raises:
        UserError: naming what the family cannot express.
    """
    config, k = model.config, _token_choice_k(model, "Mixtral")
    impossible = {
        "not every layer is routed": len(config.routed_layers) < config.num_hidden_layers,
        "there is a shared expert": bool(config.shared_expert_intermediate_size),
        "weights are not renormalised": not config.renormalize,
        "attention has biases": config.attention_bias,
    }
    for reason, holds in impossible.items():
        if holds:
            raise _refused("Mixtral", reason)
    theirs = MixtralConfig(
        **common_fields(config),
        hidden_act=_hidden_act(config, "Mixtral", dense=False),
        intermediate_size=config.moe_intermediate_size,
        num_local_experts=config.num_experts,
        num_experts_per_tok=k,
        router_aux_loss_coef=0.0,
    )
    return _filled(MixtralForCausalLM, theirs, _with_gates_per_layer(model.state_dict(), config), model)


def from_mixtral(model: MixtralForCausalLM) -> CrosswaysForCausalLM:
    """Our model with the weights and logits of a Mixtral.

    Raises:
        UserError: if it uses sliding-window attention.
    """
    theirs = model.config
    if theirs.sliding_window is not None:
        raise UserError("this Mixtral uses sliding-window attention, which crossways models do not have")
    config = CrosswaysConfig(
        **common_fields(theirs),
        **_routing(theirs.hidden_act, theirs.num_experts_per_tok, True),
        num_experts=theirs.num_local_experts,
        moe_intermediate_size=theirs.intermediate_size,
        intermediate_size=theirs.intermediate_size,
    )
    return _filled(CrosswaysForCausalLM, config, _with_gates_in_model(dict(model.state_dict()), config), model)


def _dense_layers(config: CrosswaysConfig) -> list[int]:
    """What Qwen2-MoE's `mlp_only_layers` must name beside `decoder_sparse_step`."""
    if config.moe_every and config.moe_layers is None:
        return []
    return [layer for layer in range(config.num_hidden_layers) if layer not in config.routed_layers]


def _placed(routed: list[bool], step: int) -> dict[str, Any]:
    """Our fields that say which layers are routed; `moe_every` where that can say it."""
    if not any(routed):
        return {"moe_every": 0}
    if routed == [(i + 1) % step == 0 for i in range(len(routed))]:
        return {"moe_every": step}
    return {"moe_layers": [layer for layer, is_routed in enumerate(routed) if is_routed]}


def _layer(index: int) -> str:
    return f"model.layers.{index}."


def _refused(family: str, reason: str) -> UserError:
    return UserError(f"{family} cannot express this model: {reason}")


def _plain_softmax(score: Score) -> bool:
    return isinstance(score, Softmax) or (isinstance(score, Unified) and score.alpha == 1.0)


def _token_choice_k(model: CrosswaysForCausalLM, family: str) -> int:
    """Experts per token, after refusing every routing but softmax top-k in plain layers."""
    config = model.config
    select = build_selection(config.select or "top_k")
    if config.factors != 1:
        raise _refused(family, f"its layers are Cartesian with {config.factors} factors")
    if not isinstance(select, TopK):
        raise _refused(family, f"its selection is {select.name!r}, not 'top_k'")
    if not _plain_softmax(score := build_score(config.score)):
        raise _refused(family, f"its score is {score.name!r}, not 'softmax'")
    if not isinstance(gate := build_gate(config.gate), Linear):
        raise _refused(family, f"its gate is {gate.name!r}, not 'linear'")
    if gate.bias:
        raise _refused(family, "its gates have biases")
    if config.attention_experts:
        raise _refused(family, f"its heads choose among {config.attention_experts} experts")
    if config.rounds > 1:
        raise _refused(family, f"it goes through its {config.distinct_layers} layers {config.rounds} times")
    if any(map(config.sharing_plan.reuses_decision, range(len(config.routed_layers)))):
        raise _refused(family, "layers repeat the decision of the layer before")
    if config.negated_experts:
        raise _refused(family, "its experts may also be subtracted")
    if not isinstance(config.renormalize, bool):
        raise _refused(family, f"its weights are scaled by renormalize {config.renormalize!r}")
    if config.zero_computation_experts:
        raise _refused(family, f"it has {config.zero_computation_experts} zero-computation experts")
    if config.qk_norm:
        raise _refused(family, "attention normalises queries and keys")
    if any(router.has_bias and bool(router.bias.any()) for router in model.model.routers):
        raise _refused(family, "its choices are biased by loss-free or quantile balancing")
    if config.shared_expert_intermediate_size and (config.shared_expert_gate or config.shared_expert_scale != 1.0):
        raise _refused(family, "its shared expert is gated or scaled")
    if config.moe_latent_size:
        raise _refused(family, f"its experts live in a smaller space of width {config.moe_latent_size}")
    if config.weights_on != "output":
        raise _refused(family, f"its weights multiply each expert's {config.weights_on}")
    if any(bool(parameter.any()) for name, parameter in model.named_parameters() if _is_expert_bias(name)):
        raise _refused(family, "its experts have biases that are not zero")
    if config.mlp_bias:
        raise _refused(family, "its dense layers have biases")
    if any(router.perturbation is not None for router in model.model.routers):
        raise _refused(family, "a perturbation is installed on its routers")
    return select.k


def _hidden_act(config: CrosswaysConfig, family: str, dense: bool) -> str:
    """The one activation of the family, which must be gated and the same in dense layers."""
    if not Activation(config.expert_activation).gated:
        raise _refused(family, f"its expert activation {config.expert_activation!r} is not gated")
    act = HIDDEN_ACTS[config.expert_activation]
    if dense and config.hidden_act != act:
        raise _refused(family, f"dense layers use {config.hidden_act!r} and experts {config.expert_activation!r}")
    return act


def common_fields(config: Any) -> dict[str, Any]:
    """The fields with one meaning on both sides; a head_dim that the family leaves out is its default there."""
    optional = ("pad_token_id", "bos_token_id", "eos_token_id")  # whose None means something
    values = {name: copy.deepcopy(getattr(config, name, None)) for name in COMMON_FIELDS}
    return {name: value for name, value in values.items() if value is not None or name in optional}


def _routing(hidden_act: str, k: int, renormalize: bool) -> dict[str, Any]:
    """Our configuration of a family's routing."""
    activations = {act: name for name, act in HIDDEN_ACTS.items()}
    if hidden_act not in activations:
        raise UserError(f"hidden_act {hidden_act!r} has no crossways activation; known: {sorted(activations)}")
    return {
        "select": {"name": "top_k", "k": k},
        "renormalize": renormalize,
        "hidden_act": hidden_act,
        "expert_activation": activations[hidden_act],
    }


def _is_expert_bias(name: str) -> bool:
    return ".experts." in name and name.endswith("_proj_bias")


def _with_gates_per_layer(ours: Weights, config: CrosswaysConfig) -> Weights:
    """Our weights with the model's gates handed out to their layers, Cartesian layers of one factor unwrapped, and
    the scale of the routing weights moved into the experts' second matrices, where it means the same."""
    weights = {
        name.replace(".mlp.factors.0.", ".mlp."): w
        for name, w in ours.items()
        if not name.startswith("model.gates.") and not _is_expert_bias(name)
    }
    for layer, (gate,) in zip(config.routed_layers, config.gate_plan, strict=True):
        if config.weight_scale != 1.0:
            name = f"{_layer(layer)}mlp.experts.down_proj"
            weights[name] = weights[name] * config.weight_scale
        weights[f"{_layer(layer)}mlp.gate.weight"] = ours[f"model.gates.{gate}.weight"]
    return weights


def _with_gates_in_model(weights: Weights, config: CrosswaysConfig) -> Weights:
    """A family's weights with the gates of its layers moved to the model."""
    for index, layer in enumerate(config.routed_layers):
        weights[f"model.gates.{index}.weight"] = weights.pop(f"{_layer(layer)}mlp.gate.weight")
    return weights


def _split_shared_expert(weights: Weights, mlp: str, like: Tensor) -> None:
    """Replace our shared expert by the family's, in place; a zero expert of width 1 stands for none."""
    width = like.shape[1]
    up_HD = weights.pop(f"{mlp}shared_expert.up_proj.weight", like.new_zeros(2, width))
    down_DF = weights.pop(f"{mlp}shared_expert.down_proj.weight", like.new_zeros(width, 1))
    gate_FD, up_FD = up_HD.chunk(2)
    weights[f"{mlp}shared_expert.gate_proj.weight"] = gate_FD
    weights[f"{mlp}shared_expert.up_proj.weight"] = up_FD
    weights[f"{mlp}shared_expert.down_proj.weight"] = 2 * down_DF
    weights[f"{mlp}shared_expert_gate.weight"] = like.new_zeros(1, width)


def _join_shared_expert(weights: Weights, mlp: str) -> int:
    """Replace the family's shared expert by ours, in place, and return its width; 0 for a zero one of width 1."""
    if bool(weights.pop(f"{mlp}shared_expert_gate.weight").any()):
        raise UserError(
            f"{mlp}shared_expert_gate is not zero: its shared expert is weighted by the token, which crossways lacks"
        )
    part = {name: weights.pop(f"{mlp}shared_expert.{name}_proj.weight") for name in ("gate", "up", "down")}
    width = part["down"].shape[1]
    if width == 1 and not part["down"].any():
        return 0
    weights[f"{mlp}shared_expert.up_proj.weight"] = torch.cat([part["gate"], part["up"]])
    weights[f"{mlp}shared_expert.down_proj.weight"] = part["down"] / 2
    return width


def _filled(build: Callable[[Any], Any], config: Any, weights: Weights, source: PreTrainedModel) -> Any:
    """A model of the configuration with exactly these weights (a missing or left-over name is an error), in the
    source's dtype, device, mode and generation settings."""
    reference = source.get_input_embeddings().weight
    target = build(config).to(device=reference.device, dtype=reference.dtype)
    target.load_state_dict(weights, strict=True)
    if source.generation_config is not None:
        target.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    return target.train(source.training)
