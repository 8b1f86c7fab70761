"""Renaming weights, and a model with exactly these."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from crossways.models.configuration import CrosswaysConfig

Weights = dict[str, Tensor]


def layer_name(index: int) -> str:
    return f"model.layers.{index}."


def is_expert_bias(name: str) -> bool:
    return ".experts." in name and name.endswith("_proj_bias")


def with_gates_per_layer(ours: Weights, config: CrosswaysConfig) -> Weights:
    """Our weights with the model's gates handed out to their layers, Cartesian layers of one factor unwrapped, and
    the scale of the routing weights moved into the experts' second matrices, where it means the same."""
    weights = {
        name.replace(".mlp.factors.0.", ".mlp."): w
        for name, w in ours.items()
        if not name.startswith("model.gates.") and not is_expert_bias(name)
    }
    for layer, (gate,) in zip(config.routed_layers, config.gate_plan, strict=True):
        if config.weight_scale != 1.0:
            name = f"{layer_name(layer)}mlp.experts.down_proj"
            weights[name] = weights[name] * config.weight_scale
        weights[f"{layer_name(layer)}mlp.gate.weight"] = ours[f"model.gates.{gate}.weight"]
    return weights


def with_gates_in_model(weights: Weights, config: CrosswaysConfig) -> Weights:
    """A family's weights with the gates of its layers moved to the model."""
    for index, layer in enumerate(config.routed_layers):
        weights[f"model.gates.{index}.weight"] = weights.pop(f"{layer_name(layer)}mlp.gate.weight")
    return weights


def filled(build: Callable[[Any], Any], config: Any, weights: Weights, source: PreTrainedModel) -> Any:
    """A model of the configuration with exactly these weights (a missing or left-over name is an error), in the
    source's dtype, device, mode and generation settings."""
    reference = source.get_input_embeddings().weight
    target = build(config).to(device=reference.device, dtype=reference.dtype)
    target.load_state_dict(weights, strict=True)
    if source.generation_config is not None:
        target.generation_config = type(source.generation_config).from_dict(source.generation_config.to_dict())
    return target.train(source.training)
