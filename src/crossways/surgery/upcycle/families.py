"""Which dense models can be upcycled: their configuration and weights in our words, or the reason why not.

A family is taken when transformers computes it as our decoder computes a dense model: pre-norm, RMSNorm, rotary
positions, a gated feed-forward network without biases. OLMo-2 is not (its norms stand after the sub-layers), Granite
and Gemma are not (they scale embeddings, residuals or logits), SmolLM3 is not (layers without positions).

Legend: V vocabulary, D model width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from crossways.errors import UserError
from crossways.models.convert.fields import HIDDEN_ACTS, common_fields
from crossways.surgery.upcycle.ffn import DenseFFN

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "crossways")
"""`model_type` of the families understood; of ours the dense models."""
ATTENTION_BIAS = {"qwen2": True, "mistral": False}
"""Families whose configuration does not say it."""
REASONS = {
    "olmo": "its norms have no weights",
    "olmo2": "its norms stand after attention and feed-forward",
    "olmo3": "its norms stand after attention and feed-forward",
    "granite": "it scales embeddings, residuals and logits",
    "gemma": "it scales embeddings and its norms add one to their weights",
    "gemma2": "it has norms before and after each sub-layer and caps logits",
    "smollm3": "some of its layers have no rotary positions",
    "phi3": "its projections are fused",
    "gpt2": "its positions are learnt and its feed-forward network is not gated",
}


def dense_fields(model: PreTrainedModel) -> dict[str, Any]:
    """`CrosswaysConfig` fields that express a dense model, without any of routing.

    Raises:
        UserError: with the reason, for a model that our decoder cannot compute.
    """
    config, family = model.config, model.config.model_type
    if family not in FAMILIES:
        reason = REASONS.get(family, f"known are {', '.join(FAMILIES)}")
        raise UserError(f"cannot upcycle a {family!r} model: {reason}")
    if family == "crossways" and config.routed_layers:
        raise UserError("this model is routed already; upcycling starts from a dense one (moe_every = 0)")
    if family == "crossways" and config.rounds > 1:
        raise UserError(
            f"this model goes through its {config.distinct_layers} layers {config.rounds} times; upcycling starts "
            "from layers that are all distinct"
        )
    if config.hidden_act not in HIDDEN_ACTS.values():
        raise UserError(
            f"experts have no activation like hidden_act {config.hidden_act!r}; known: {sorted(HIDDEN_ACTS.values())}"
        )
    if getattr(config, "mlp_bias", False):
        raise UserError("its feed-forward networks have biases (mlp_bias), which experts have not")
    _refuse_sliding_window(config)
    return common_fields(config) | {
        "attention_bias": ATTENTION_BIAS.get(family, getattr(config, "attention_bias", False)),
        "qk_norm": family == "qwen3" or getattr(config, "qk_norm", False),
        "hidden_act": config.hidden_act,
        "intermediate_size": config.intermediate_size,
        "expert_activation": {act: name for name, act in HIDDEN_ACTS.items()}[config.hidden_act],
    }


def dense_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's weights under our names, feed-forward networks still dense; the tensors are not copied.

    Raises:
        UserError: for quantised weights.
    """
    weights = dict(model.state_dict())
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise UserError(f"{name} is {weight.dtype}, not floating point; load the model without quantisation")
    if model.config.model_type == "qwen2":  # biases in, but not out of, attention
        zero_D = weights["model.embed_tokens.weight"].new_zeros(model.config.hidden_size)
        for layer in range(model.config.num_hidden_layers):
            weights[f"model.layers.{layer}.self_attn.o_proj.bias"] = zero_D.clone()
    return weights


def take_ffn(weights: dict[str, Tensor], layer: int) -> DenseFFN:
    """Take a layer's feed-forward network out of the weights."""
    gate_FD, up_FD, down_DF = (
        weights.pop(f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down")
    )
    return DenseFFN(gate_FD.detach(), up_FD.detach(), down_DF.detach())


def _refuse_sliding_window(config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if window is None or (kinds is not None and "sliding_attention" not in kinds):
        return
    if window < config.max_position_embeddings:
        raise UserError(
            f"its attention slides over {window} tokens, which ours does not; within that length the two agree: set "
            f"max_position_embeddings of its configuration (now {config.max_position_embeddings}) to {window}"
        )
