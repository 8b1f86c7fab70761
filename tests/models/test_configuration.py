"""The configuration: plain JSON, one-line refusals, and the plans derived from it."""

from __future__ import annotations

import json
import math

import pytest
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig

from crossways.errors import UserError
from crossways.models import CrosswaysConfig
from crossways.models.configuration import user_errors

KINDS = [
    {},
    {"moe_every": 0},
    {"layer": "cartesian", "num_factors": 3, "cartesian_skip": "input"},
    {"score": {"name": "unified", "alpha": 0.25}, "select": {"name": "top_c", "k": 1.5, "group": "batch"}},
    {"select": {"name": "threshold", "value": 0.2}, "sharing": {"name": "block", "size": 2}},
    {"gate": {"name": "recurrent", "state_size": 8}, "sharing": {"name": "decision", "size": [1, 1]}},
    {"moe_layers": [1], "moe_latent_size": 8, "expert_bias": True, "weights_on": "input"},
    {"load_balance_coef": 0, "router_z_loss_coef": 1, "cutoff_momentum": 0},
]


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_the_configuration_is_plain_json_and_round_trips(tiny_config, tmp_path, fields):
    config = tiny_config(**fields)
    as_json = json.loads(config.to_json_string())
    for name, value in fields.items():
        assert as_json[name] == value
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is CrosswaysConfig
    assert json.loads(again.to_json_string()) == json.loads(config.to_json_string())


def test_names_alone_become_dictionaries(tiny_config):
    config = tiny_config(score="sigmoid", sharing="layer")
    assert config.score == {"name": "sigmoid"}
    assert config.select == {"name": "top_k", "k": 2}
    assert config.sharing == {"name": "layer"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "softmx"}, "did you mean 'softmax'"),
        ({"select": {"name": "top_k", "k": 5}}, "k = 5 with 4 experts"),
        ({"select": {"name": "top_c", "k": 1, "grup": "batch"}}, "did you mean 'group'"),
        ({"sharing": {"name": "block", "size": 0}}, "size must be"),
        ({"sharing": {"name": "block"}}, "size"),
        ({"layer": "moes"}, "layer must be one of"),
        ({"cartesian_skip": "none"}, "cartesian_skip must be one of"),
        ({"num_factors": 0}, "num_factors must be at least 1"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({"num_experts": "4"}, "num_experts"),
        ({"num_experts": 2.5}, "num_experts"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size must be at least 1"),
        ({"shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size must be at least 0"),
        ({"moe_every": -1}, "moe_every must be 0"),
        ({"moe_every": 3}, "leaves no routed layer among 2"),
        ({"moe_layers": []}, "moe_layers is empty; for a dense model"),
        ({"moe_layers": [0, 2]}, r"from 0 to 1 .* got \[0, 2\]"),
        ({"moe_layers": [-1, 1]}, r"ascending indices of layers"),
        ({"moe_layers": [1, 0]}, r"ascending .* got \[1, 0\]"),
        ({"moe_layers": [1, 1]}, r"not a 0 or 1 for each layer\), got \[1, 1\]"),
        ({"moe_layers": [False, True]}, r"moe_layers|ascending"),
        ({"moe_layers": [0.5]}, "moe_layers"),
        ({"moe_layers": [1], "moe_every": 2}, r"moe_layers = \[1\] and moe_every = 2 contradict"),
        ({"moe_layers": [1], "moe_every": 0}, r"moe_layers = \[1\] and moe_every = 0 contradict"),
        ({"moe_layers": [1], "sharing": {"name": "block", "size": [1, 1]}}, "are 2 layers, the model routes 1"),
        ({"distinct_layers": -1}, "distinct_layers must be at least 0"),
        (
            {"num_hidden_layers": 6, "distinct_layers": 4},
            "num_hidden_layers = 6 is no multiple of distinct_layers = 4",
        ),
        ({"distinct_layers": 4}, "num_hidden_layers = 2 is no multiple of distinct_layers = 4"),
        ({"distinct_layers": 1, "moe_every": 2}, r"layer i \+ 1 is layer i .* route \[1\]"),
        (
            {"num_hidden_layers": 4, "distinct_layers": 2, "moe_layers": [0, 3]},
            r"both or neither are routed; .* route \[0, 3\]",
        ),
        (
            {"num_hidden_layers": 4, "distinct_layers": 2, "sharing": {"name": "block", "size": [2, 2]}},
            "are 4 layers, the model routes 2",
        ),
        ({"moe_latent_size": -1}, "moe_latent_size must be at least 0"),
        ({"weights_on": "input", "negated_experts": True}, "weights_on must be output, got 'input'"),
        ({"weights_on": "both"}, "weights_on must be one of"),
        ({"expert_bias": 1}, "expert_bias"),
        ({"expert_activation": "swish"}, "unknown expert activation 'swish'"),
        ({"load_balance_coef": -0.1}, "load_balance_coef must lie in"),
        ({"load_balance_coef": math.nan}, "load_balance_coef must lie in"),
        ({"cutoff_momentum": 1.5}, "cutoff_momentum must lie in"),
        ({"hidden_size": 15}, "not a multiple"),
        ({"select": 3}, "select"),
        ({"sharing": {"name": "block", "size": [2, 1]}}, "are 3 layers, the model routes 2"),
        ({"gate": {"name": "hash", "k": 1}}, "gate 'hash' names k = 1 experts but selection 'top_k' takes 2"),
        ({"gate": {"name": "hash", "k": 5}, "select": {"name": "top_c", "k": 1}}, "k = 5 exceeds"),
        ({"gate": "recurent"}, "did you mean 'recurrent'"),
        ({"gate_loss_coef": -1}, "gate_loss_coef must lie in"),
        ({"select": {"name": "capacity", "zero_computation": 2}, "zero_experts": 1}, "are 1 together"),
        ({"select": {"name": "capacity", "tau": 0}}, "tau must be a finite number above 0"),
        ({"select": {"name": "capacity", "zero_computation": -1}}, "zero_computation must be a whole number"),
        ({"quantile_balancing": True, "bias_update_rate": 0.1}, "both move the bias"),
        (
            {"quantile_balancing": True, "select": {"name": "top_c", "k": 1}},
            "needs selection 'top_k' of fewer",
        ),
        (
            {"quantile_balancing": True, "select": {"name": "top_k", "k": 4}},
            "needs selection 'top_k' of fewer",
        ),
        ({"quantile_balancing": True, "quantile_momentum": 1}, "quantile_momentum must lie in"),
        ({"load_balance_scope": "step", "load_balance_pairs": "first"}, "counts executed pairs"),
        ({"load_balance_probs": "sigmoid"}, "load_balance_probs must be one of"),
        ({"shared_expert_scale": 0}, "shared_expert_scale must be a number above 0"),
        ({"router_jitter": 1.0}, "router_jitter must lie in"),
        ({"load_balance_temperature": 0}, "load_balance_temperature must be a number above 0"),
        ({"load_coef": 0.1}, "load_coef needs the noise of gate 'noisy', the gate is 'linear'"),
        ({"load_coef": 0.1, "gate": "noisy", "select": {"name": "top_c", "k": 1}}, "load_coef needs each token's k"),
        ({"communication_balance_coef": 0.1}, "needs selection 'group_limited'.* the selection is 'top_k'"),
        ({"device_balance_coef": 0.1}, "set expert_groups, or selection 'group_limited' instead of 'top_k'"),
        ({"device_balance_coef": 0.1, "expert_groups": 3}, "4 experts do not divide into expert_groups = 3"),
    ],
    ids=str,
)
def test_impossible_values_are_refused_in_one_line(tiny_config, fields, message):
    with pytest.raises(UserError, match=message) as error:
        tiny_config(**fields)
    assert "\n" not in str(error.value)


def test_subclasses_refuse_as_plainly():
    @user_errors
    @strict
    class Derived(CrosswaysConfig):
        model_type = "crossways_derived"

    with pytest.raises(UserError, match="layer must be one of"):
        Derived(layer="nothing")


def test_plans_follow_the_routed_layers(tiny_config):
    config = tiny_config(num_hidden_layers=6, moe_every=2, sharing={"name": "block", "size": 2})
    assert config.routed_layers == [1, 3, 5]
    assert config.gate_plan == [(0,), (0,), (1,)]
    cartesian = tiny_config(layer="cartesian", num_factors=2, sharing={"name": "block", "size": 2})
    assert cartesian.factors == 2
    assert cartesian.gate_plan == [(0, 1), (0, 1)]
    assert tiny_config(num_factors=5).factors == 1
    assert tiny_config(moe_every=0).routed_layers == []
    again = tiny_config(num_hidden_layers=6, distinct_layers=3, sharing={"name": "block", "size": [1, 2]})
    assert again.gate_plan == [(0,), (1,), (1,)] * 2
    assert again.router_names == [f"layer {i}" for i in range(1, 7)]
    unequal = {"num_hidden_layers": 6, "sharing": {"name": "block", "size": [1, 2]}}
    pattern = tiny_config(moe_layers=[0, 2, 5], **unequal)
    assert pattern.routed_layers == [0, 2, 5]
    assert pattern.gate_plan == [(0,), (1,), (1,)]
    assert pattern.router_names == ["layer 1", "layer 3", "layer 6"]
