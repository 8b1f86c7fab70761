"""What configurations of both sides say in their own words."""

from __future__ import annotations

import copy
from typing import Any

from crossways.errors import UserError
from crossways.experts.activation import Activation
from crossways.models.configuration import CrosswaysConfig
from crossways.models.convert.refusals import refused

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


def common_fields(config: Any) -> dict[str, Any]:
    """The fields with one meaning on both sides; a head_dim that the family leaves out is its default there."""
    optional = ("pad_token_id", "bos_token_id", "eos_token_id")  # whose None means something
    values = {name: copy.deepcopy(getattr(config, name, None)) for name in COMMON_FIELDS}
    return {name: value for name, value in values.items() if value is not None or name in optional}


def hidden_act(config: CrosswaysConfig, family: str, dense: bool) -> str:
    """The one activation of the family, which must be gated and the same in dense layers."""
    if not Activation(config.expert_activation).gated:
        raise refused(family, f"its expert activation {config.expert_activation!r} is not gated")
    act = HIDDEN_ACTS[config.expert_activation]
    if dense and config.hidden_act != act:
        raise refused(family, f"dense layers use {config.hidden_act!r} and experts {config.expert_activation!r}")
    return act


def routing(hidden_act: str, k: int, renormalize: bool) -> dict[str, Any]:
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


def dense_layers(config: CrosswaysConfig) -> list[int]:
    """What Qwen2-MoE's `mlp_only_layers` must name beside `decoder_sparse_step`."""
    if config.moe_every and config.moe_layers is None:
        return []
    return [layer for layer in range(config.num_hidden_layers) if layer not in config.routed_layers]


def placed(routed: list[bool], step: int) -> dict[str, Any]:
    """Our fields that say which layers are routed; `moe_every` where that can say it."""
    if not any(routed):
        return {"moe_every": 0}
    if routed == [(i + 1) % step == 0 for i in range(len(routed))]:
        return {"moe_every": step}
    return {"moe_layers": [layer for layer, is_routed in enumerate(routed) if is_routed]}
