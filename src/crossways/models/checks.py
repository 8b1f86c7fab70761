"""What a configuration must satisfy beyond its types: ranges, and parts that fit each other."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

from crossways.errors import UserError
from crossways.experts.activation import Activation
from crossways.gates import build_gate
from crossways.rules.score import build_score
from crossways.rules.select import Capacity, GroupLimited, ScheduledTopK, Selection, Threshold, TopK, build_selection
from crossways.sharing import build_sharing
from crossways.weighing import check_renormalize

if TYPE_CHECKING:
    from crossways.models.configuration import CrosswaysConfig

CHOICES = {
    "layer": ("moe", "cartesian"),
    "cartesian_skip": ("factor", "input"),
    "router_input": ("factor", "layer"),
    "weights_on": ("output", "input"),
    "router_dtype": ("float32", "float64"),
    "load_balance_probs": ("softmax", "scores", "cosine"),
    "load_balance_over": ("slots", "experts"),
    "load_balance_pairs": ("executed", "asked", "first"),
    "load_balance_scope": ("batch", "step", "global"),
}
"""Fields that name one of several."""
LEAST = {
    "distinct_layers": 0,
    "attention_experts": 0,
    "num_factors": 1,
    "num_experts": 1,
    "moe_intermediate_size": 1,
    "moe_latent_size": 0,
    "shared_expert_intermediate_size": 0,
    "zero_experts": 0,
    "copy_experts": 0,
    "constant_experts": 0,
    "expert_groups": 0,
}
"""Least value of whole numbers."""
MOST = {
    "load_balance_coef": math.inf,
    "sequence_balance_coef": math.inf,
    "zero_reward_coef": math.inf,
    "importance_coef": math.inf,
    "load_coef": math.inf,
    "device_balance_coef": math.inf,
    "communication_balance_coef": math.inf,
    "excess_load_coef": math.inf,
    "entropy_coef": math.inf,
    "sequence_entropy_coef": math.inf,
    "mutual_information_coef": math.inf,
    "router_z_loss_coef": math.inf,
    "gate_loss_coef": math.inf,
    "bias_update_rate": math.inf,
    "cutoff_momentum": 1,
    "zero_computation_balance": math.inf,
    "router_initializer_range": math.inf,
    "quantile_momentum": 0.999,
    "expert_dropout": 0.999,
    "router_jitter": 0.999,
    "router_dropout": 0.999,
}
"""Greatest value of numbers that start at 0."""
ABOVE = {
    "weight_scale": 0,
    "shared_expert_scale": 0,
    "load_balance_temperature": 0,
    "sparsity_coef_start": 0,
    "sparsity_coef_growth": 1,
}
"""What numbers must exceed."""


def check_configuration(config: CrosswaysConfig) -> None:
    """Raise `UserError` unless every value can be built, and fits the others."""
    _check_ranges(config)
    Activation(config.expert_activation)
    build_score(config.score)
    check_renormalize(config.renormalize, config.zero_experts)
    select = build_selection(config.select or "top_k")
    select.check(config.router_size)
    build_gate(config.gate).check(config.router_size, select)
    if isinstance(select, Capacity) and select.zero_computation not in (0, config.zero_computation_experts):
        raise UserError(
            f"selection 'capacity' says zero_computation = {select.zero_computation}, but zero_experts, copy_experts "
            f"and constant_experts are {config.zero_computation_experts} together"
        )
    _check_slots(config)
    _check_losses(config, select)
    _check_attention(config)
    build_sharing(config.sharing)
    if config.distinct_layers:
        _check_rounds(config)
    if config.routed_layers:
        config.sharing_plan.check(len(config.routed_layers))


def _check_ranges(config: CrosswaysConfig) -> None:
    if config.moe_every < 0:
        raise UserError(f"moe_every must be 0 (dense) or more, got {config.moe_every}")
    if config.moe_every > config.num_hidden_layers:
        raise UserError(f"moe_every = {config.moe_every} leaves no routed layer among {config.num_hidden_layers}")
    if config.moe_layers is not None:
        _check_layers(config.moe_layers, config)
    for field, known in CHOICES.items():
        if (name := getattr(config, field)) not in known:
            raise UserError(f"{field} must be one of {known}, got {name!r}")
    for field, least in LEAST.items():
        if (value := getattr(config, field)) < least:
            raise UserError(f"{field} must be at least {least}, got {value}")
    for field, most in (MOST | {"sparsity_budget": config.router_size}).items():
        if not 0 <= (value := getattr(config, field)) <= most:
            raise UserError(f"{field} must lie in [0, {most}], got {value}")
    for field, least in ABOVE.items():
        if not least < (value := getattr(config, field)) < math.inf:
            raise UserError(f"{field} must be a number above {least}, got {value}")


def _check_layers(layers: list[int], config: CrosswaysConfig) -> None:
    """`moe_layers` by itself, and beside `moe_every`."""
    if not layers:
        raise UserError("moe_layers is empty; for a dense model leave it out and set moe_every to 0")
    ascending = all(before < after for before, after in pairwise(layers))
    if not ascending or not 0 <= layers[0] <= layers[-1] < config.num_hidden_layers:
        raise UserError(
            "moe_layers must be ascending indices of layers, from 0 to "
            f"{config.num_hidden_layers - 1} (not a 0 or 1 for each layer), got {layers}"
        )
    if config.moe_every != 1:
        raise UserError(f"moe_layers = {layers} and moe_every = {config.moe_every} contradict: leave one out")


def _check_rounds(config: CrosswaysConfig) -> None:
    """Layers that are gone through again must be whole rounds, and a routed layer is routed in all of them."""
    distinct, layers = config.distinct_layers, config.num_hidden_layers
    if layers % distinct:
        raise UserError(f"num_hidden_layers = {layers} is no multiple of distinct_layers = {distinct}")
    routed = set(config.routed_layers)
    if any((layer in routed) != (layer % distinct in routed) for layer in range(layers)):
        raise UserError(
            f"layer i + {distinct} is layer i (distinct_layers = {distinct}), so both or neither are routed; "
            f"moe_every or moe_layers route {sorted(routed)}"
        )


def _check_attention(config: CrosswaysConfig) -> None:
    """Heads choose by the token alone, so that cached values stay what they were."""
    score, select = build_score(config.attention_score), build_selection(config.attention_select or "top_k")
    if not config.attention_experts:
        return
    select.check(config.attention_experts)
    estimated = isinstance(select, Threshold) and select.value is None
    for field, rule in (("attention_score", score), ("attention_select", select)):
        if not (rule.causal and rule.batch_invariant) or (rule is select and (select.scheduled or estimated)):
            raise UserError(f"{field} must decide for each token by itself, always alike; {rule} does not")
    known, routed = ("query", "key", "value", "output"), config.attention_projections or []
    if not routed or not set(routed) <= set(known) or len(set(routed)) < len(routed):
        raise UserError(f"attention_projections must be some of {known}, each once, got {routed}")
    if config.attention_bias:
        raise UserError(f"attention_experts = {config.attention_experts} have no biases: turn attention_bias off")


def _check_slots(config: CrosswaysConfig) -> None:
    """Offsets and losses that need slots of a certain kind."""
    for field in ("negated_logit_offset", "zero_logit_offset"):
        if not math.isfinite(value := getattr(config, field)):
            raise UserError(f"{field} must be a finite number, got {value}")
    if config.negated_logit_offset and not config.negated_experts:
        raise UserError("negated_logit_offset is for slots that subtract: set negated_experts too")
    if config.negated_experts and config.weights_on != "output":
        raise UserError(
            f"negated_experts subtract what an expert returns: weights_on must be output, got {config.weights_on!r}"
        )
    if not config.zero_experts:
        for field in ("zero_logit_offset", "zero_reward_coef"):
            if getattr(config, field):
                raise UserError(f"{field} is for zero experts: set zero_experts too")
    if config.load_balance_over == "experts" and config.zero_computation_balance != 1:
        raise UserError(
            "load_balance_over 'experts' leaves zero-computation experts out of the balance loss: leave "
            "zero_computation_balance at 1"
        )


def _check_losses(config: CrosswaysConfig, select: Selection) -> None:
    """Losses that need something of the gate or of the selection, and balancing that excludes another."""
    if config.quantile_balancing:
        if not isinstance(select, TopK) or select.k >= config.router_size:
            raise UserError(f"quantile_balancing needs selection 'top_k' of fewer than all experts, not {select}")
        if config.bias_update_rate:
            raise UserError("quantile_balancing and bias_update_rate both move the bias: choose one")
    if config.load_balance_scope != "batch" and config.load_balance_pairs != "executed":
        raise UserError(
            f"load_balance_scope {config.load_balance_scope!r} counts executed pairs: set load_balance_pairs to "
            "executed"
        )
    if config.load_balance_probs == "cosine" and (gate := build_gate(config.gate).name) != "cosine":
        raise UserError(f"load_balance_probs 'cosine' needs gate 'cosine', the gate is {gate!r}: change one of them")
    if config.load_coef:
        gate = build_gate(config.gate).name
        if gate != "noisy":
            raise UserError(f"load_coef needs the noise of gate 'noisy', the gate is {gate!r}: change one of them")
        if not isinstance(select, TopK | ScheduledTopK):
            raise UserError(f"load_coef needs each token's k best logits: selection 'top_k', not {select.name!r}")
    if config.communication_balance_coef and not isinstance(select, GroupLimited):
        raise UserError(
            "communication_balance_coef needs selection 'group_limited', which says how many groups a token may "
            f"visit; the selection is {select.name!r}"
        )
    if config.device_balance_coef and not config.num_groups:
        raise UserError(
            "device_balance_coef needs groups of experts: set expert_groups, or selection 'group_limited' instead "
            f"of {select.name!r}"
        )
    if config.expert_groups and config.router_size % config.expert_groups:
        raise UserError(f"{config.router_size} experts do not divide into expert_groups = {config.expert_groups}")
