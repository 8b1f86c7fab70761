"""`upcycle`: a dense causal language model becomes a `CrosswaysForCausalLM`.

Where the parameters start. Embeddings, attention, norms, head and the layers that stay dense: the dense model's. In a
routed layer each expert e = c G + g holds shard g (copy c) of the feed-forward network. With a shared expert of S
neurons (`shared_expert_intermediate_size`), it keeps S of them and the others are divided into shards; if it is gated
by the token, the gate starts at one half for all and the second matrix is doubled, and its scale is divided out.

Cartesian layers, h1 = r + A(N1(r)) and h2 = h1 + B(N2(h1)): factor A is what a plain layer would be, and carries the
dense function. B, and any further factor, starts silent: its second matrices (`down_proj`) are zero, so h2 = h1
exactly whatever N2 and its router say. Its first matrices are the same shards, not zero, and N2 starts as N1, so
that the gradient of `down_proj` is alive from the first step, that of B's first matrices and gate from the second.

Legend: F dense width, E experts, W expert width, D model width, G shards, S shared neurons.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from crossways.errors import UserError
from crossways.gates import LinearGate
from crossways.models.configuration import CrosswaysConfig
from crossways.models.modeling import CrosswaysForCausalLM
from crossways.surgery.upcycle.families import dense_fields, dense_weights, take_ffn
from crossways.surgery.upcycle.ffn import DenseFFN, disturb
from crossways.surgery.upcycle.gate_start import choose_start, start_at_centres, start_in_groups
from crossways.surgery.upcycle.identity import differences, restoring_scale
from crossways.surgery.upcycle.neurons import divide
from crossways.surgery.upcycle.settings import UpcycleSettings

FROM_THE_FFN = ("moe_intermediate_size", "expert_activation", "qk_norm")
"""Own fields of the configuration that follow from the dense model."""


@dataclass(frozen=True)
class Upcycled:
    """A routed model made of a dense one."""

    model: CrosswaysForCausalLM
    """In the dense model's dtype, device and mode."""
    differences: tuple[str, ...]
    """Why it is not the same function as the dense model; empty when it is, by construction, up to rounding."""


def upcycle(dense: PreTrainedModel, routing: Mapping[str, Any], settings: UpcycleSettings | None = None) -> Upcycled:
    """Make a routed model of a dense one, which stays as it is.

    Args:
        dense: Llama, Mistral, Qwen2, Qwen3, or a dense model of ours.
        routing: fields of `CrosswaysConfig`, such as `num_experts`, `select`, `sharing`, `layer`, `moe_every`. Left
            out, `renormalize` is true where the routed experts carry the dense function, and `weight_scale` what
            keeps it then (`restoring_scale`).
        settings: how the feed-forward networks become experts.

    Raises:
        UserError: a model that is not understood (with the reason), or sizes that do not divide.
    """
    settings = settings or UpcycleSettings()
    config = upcycled_config(dense, routing, settings)
    start = choose_start(config, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = CrosswaysForCausalLM(config)
    reference = dense.get_input_embeddings().weight
    model.to(device=reference.device, dtype=reference.dtype)  # type: ignore[call-arg]
    with torch.no_grad():
        _fill(model, dense_weights(dense), settings, centres=start == "centres")
    if start == "groups":
        start_in_groups(model, settings.granularity)
    if dense.generation_config is not None:
        model.generation_config = type(dense.generation_config).from_dict(dense.generation_config.to_dict())
    reasons = differences(config, settings, grouped=start == "groups")
    return Upcycled(model.train(dense.training), reasons)


def upcycled_config(dense: PreTrainedModel, routing: Mapping[str, Any], settings: UpcycleSettings) -> CrosswaysConfig:
    """The configuration of the result; raises `UserError` as `upcycle` does."""
    for name in routing:
        if name in FROM_THE_FFN or name in vars(LlamaConfig)["__annotations__"]:
            raise UserError(f"{name} follows from the dense model and cannot be set")
    fields = {**dense_fields(dense), "renormalize": settings.carrier == "experts", **routing}
    width, shards = fields["intermediate_size"], settings.granularity
    if settings.carrier == "shared":
        if routing.get("shared_expert_intermediate_size", width) != width:
            raise UserError(f"the shared expert that carries the dense function has its width, {width}")
        fields["shared_expert_intermediate_size"], routed = width, width
    else:
        routed = width - fields.get("shared_expert_intermediate_size", 0)
    if routed < shards or routed % shards:
        raise UserError(f"{routed} routed neurons (of {width}) do not divide into granularity = {shards} shards")
    if latent := fields.get("moe_latent_size"):
        raise UserError(
            f"experts made of a dense network read the model's width: moe_latent_size = {latent} is not 0"
        )
    if heads := fields.get("attention_experts"):
        raise UserError(f"a dense model's attention stays as it is: attention_experts = {heads} is not 0")
    if distinct := fields.get("distinct_layers"):
        raise UserError(f"a dense model's layers are all distinct: distinct_layers = {distinct} is not 0")
    config = CrosswaysConfig(**{**fields, "moe_intermediate_size": routed // shards})
    if not config.routed_layers:
        raise UserError("no layer would be routed: moe_every is 0")
    if config.num_experts % shards:
        raise UserError(f"num_experts = {config.num_experts} is no multiple of granularity = {shards}")
    if "weight_scale" not in routing and settings.carrier == "experts":
        config.weight_scale = restoring_scale(config, shards)
    return config


def _fill(model: CrosswaysForCausalLM, weights: dict[str, Tensor], settings: UpcycleSettings, centres: bool) -> None:
    """Replace every weight but the gates' and the routers', and the biases of experts, which start at zero."""
    generator = torch.Generator().manual_seed(settings.seed)
    for index, layer in enumerate(model.config.routed_layers):
        mlp = f"model.layers.{layer}.mlp."
        ffn = take_ffn(weights, layer)
        neurons = _divided(ffn, model.config, settings, layer)
        norm = weights[f"model.layers.{layer}.post_attention_layernorm.weight"]
        for factor in range(model.config.factors):
            cartesian = model.config.layer == "cartesian"
            prefix = f"{mlp}factors.{factor}." if cartesian else mlp
            weights |= _factor(ffn, neurons, model.config, settings, generator, prefix, silent=factor > 0)
            if factor:
                weights[f"{mlp}norms.{factor - 1}.weight"] = norm
        if centres:
            centre_ED = ffn.gate_FD[neurons[1]].mean(1)
            for gate in model.config.gate_plan[index]:
                start_at_centres(cast(LinearGate, model.model.gates[gate]), centre_ED)
    missing, left_over = model.load_state_dict(weights, strict=False)
    learnt = (".gates.", ".router.", ".zero_computation.", "_proj_bias", "training_passes")
    missing = [name for name in missing if not any(part in f".{name}" for part in learnt)]
    if missing or left_over:
        raise UserError(f"this model's weights are not as expected: missing {missing[:3]}, unknown {left_over[:3]}")


def _divided(ffn: DenseFFN, config: CrosswaysConfig, settings: UpcycleSettings, layer: int) -> tuple[Tensor, Tensor]:
    """Neurons of the shared expert (S,) and of each expert (E, W)."""
    how, seed, shards = settings.neurons, settings.seed + layer, settings.granularity
    copies = config.num_experts // shards
    if settings.carrier == "shared":
        _, neurons_GW = divide(ffn, 0, shards, how, seed)
        return torch.arange(ffn.width), neurons_GW.repeat(copies, 1)
    shared_S, neurons_GW = divide(ffn, config.shared_expert_intermediate_size, shards, how, seed)
    return shared_S, neurons_GW.repeat(copies, 1)


def _factor(
    ffn: DenseFFN,
    neurons: tuple[Tensor, Tensor],
    config: CrosswaysConfig,
    settings: UpcycleSettings,
    generator: torch.Generator,
    prefix: str,
    silent: bool,
) -> dict[str, Tensor]:
    """Weights of one routed (sub-)layer; a `silent` one starts with second matrices of zero."""
    shared_S, neurons_EW = neurons
    gate_up_EHD, down_EDW = disturb(*ffn.experts(neurons_EW), settings.noise, settings.redraw, generator)
    if silent or settings.carrier == "shared":
        down_EDW = torch.zeros_like(down_EDW)
    weights = {f"{prefix}experts.gate_up_proj": gate_up_EHD, f"{prefix}experts.down_proj": down_EDW}
    if config.shared_expert_intermediate_size:
        up_HD, down_DS = ffn.shared_expert(shared_S)
        weights[f"{prefix}shared_expert.up_proj.weight"] = up_HD
        if config.shared_expert_gate:  # sigmoid(0 x) is one half
            weights[f"{prefix}shared_expert.gate.weight"] = up_HD.new_zeros(1, config.hidden_size)
            down_DS = 2 * down_DS
        down_DS = down_DS / config.shared_expert_scale
        weights[f"{prefix}shared_expert.down_proj.weight"] = torch.zeros_like(down_DS) if silent else down_DS
    return weights
