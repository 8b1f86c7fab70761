"""An upcycled model is the dense function wherever that holds by construction, and says why where it is not."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from crossways.errors import UserError
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.surgery.upcycle import UpcycleSettings, upcycle

TINY_DENSE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama_tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
    "llama_biased_attention": (LlamaForCausalLM, LlamaConfig, {"attention_bias": True, "rms_norm_eps": 1e-2}),
    "llama_head_dim": (LlamaForCausalLM, LlamaConfig, {"head_dim": 4, "hidden_act": "gelu"}),
    "llama_rope_scaled": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": None, "head_dim": 12}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 12}),
    "ours": (CrosswaysForCausalLM, CrosswaysConfig, {"moe_every": 0}),
}


def build_dense(family):
    build, config, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = build(config(**(TINY_DENSE | fields)))
    with torch.no_grad():  # norms and biases start at one and zero, which would hide that they were forgotten
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def difference(one, other):
    """Greatest difference in logits, on padded rows too."""
    ids_BS = torch.randint(1, 37, (3, 9), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :3] = 0
    with torch.no_grad():
        a, b = (model(ids_BS, attention_mask=mask_BS).logits[mask_BS.bool()] for model in (one, other))
    assert a.std() > 0.1
    return float((a - b).abs().max())


TOP2 = {"name": "top_k", "k": 2}
SAME = {
    "copies": ({"num_experts": 4, "select": TOP2}, {}),
    "copies_every_second_layer": ({"num_experts": 4, "moe_every": 2}, {}),
    "copies_in_any_layers": ({"num_experts": 4, "moe_layers": [1], "expert_bias": True}, {}),
    "copies_with_a_weight_of_one_on_the_input": (
        {"num_experts": 4, "select": {"name": "top_k", "k": 1}, "weights_on": "input"},
        {},
    ),
    "shards_with_weights_of_one_on_the_input": (
        {"num_experts": 8, "select": TOP2, "weights_on": "input"},
        {"granularity": 2},
    ),
    "copies_beside_a_shared_part": ({"num_experts": 4, "shared_expert_intermediate_size": 8}, {}),
    "copies_top_p": ({"num_experts": 4, "select": {"name": "top_p", "p": 0.5}}, {}),
    "copies_sigmoid": ({"num_experts": 4, "score": "sigmoid", "select": {"name": "top_k", "k": 1}}, {}),
    "copies_one_gate_for_all": ({"num_experts": 4, "sharing": "all", "gate": "cosine"}, {}),
    "copies_one_decision": ({"num_experts": 4, "sharing": {"name": "decision", "size": 2}}, {}),
    "copies_beside_a_gated_and_scaled_part": (
        {
            "num_experts": 4,
            "shared_expert_intermediate_size": 8,
            "shared_expert_gate": True,
            "shared_expert_scale": 0.5,
        },
        {},
    ),
    "split_all_chosen": ({"num_experts": 4, "select": {"name": "top_k", "k": 4}}, {"granularity": 4}),
    "split_random": (
        {"num_experts": 3, "select": {"name": "top_k", "k": 3}},
        {"granularity": 3, "neurons": "random"},
    ),
    "split_beside_a_shared_part": (
        {"num_experts": 4, "select": {"name": "top_k", "k": 4}, "shared_expert_intermediate_size": 4},
        {"granularity": 4, "neurons": "contiguous"},
    ),
    "fine_grained": ({"num_experts": 8, "select": {"name": "top_k", "k": 4}}, {"granularity": 2}),
    "fine_grained_shared_gate": ({"num_experts": 8, "sharing": "all"}, {"granularity": 2}),
    "fine_grained_unified": ({"num_experts": 8, "score": {"name": "unified", "alpha": 0.5}}, {"granularity": 2}),
    "cartesian": ({"num_experts": 4, "layer": "cartesian"}, {}),
    "cartesian_of_three": ({"num_experts": 4, "layer": "cartesian", "num_factors": 3}, {"granularity": 2}),
    "cartesian_beside_a_shared_part": (
        {"num_experts": 4, "layer": "cartesian", "shared_expert_intermediate_size": 8, "sharing": "all"},
        {"granularity": 2},
    ),
    "carried_usmoe": (
        {
            "num_experts": 4,
            "renormalize": False,
            "score": {"name": "unified", "alpha": 0.5},
            "select": {"name": "top_c", "k": 1.5},
        },
        {"granularity": 2, "carrier": "shared"},
    ),
    "carried_cartesian_expert_choice": (
        {"num_experts": 4, "layer": "cartesian", "select": {"name": "expert_choice", "k": 2}, "zero_experts": 1},
        {"carrier": "shared", "noise": 0.5, "redraw": 0.5},
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_the_same_function_by_construction(kind):
    routing, settings = SAME[kind]
    dense = build_dense("llama")
    upcycled = upcycle(dense, routing, UpcycleSettings(**settings))
    assert upcycled.differences == ()
    assert difference(dense, upcycled.model.eval()) < 2e-5


@pytest.mark.parametrize("dense_family", FAMILIES)
def test_every_family(dense_family):
    dense = build_dense(dense_family)
    for routing, settings in (SAME["copies_every_second_layer"], SAME["fine_grained"], SAME["cartesian"]):
        upcycled = upcycle(dense, routing, UpcycleSettings(**settings))
        assert upcycled.differences == ()
        assert difference(dense, upcycled.model) < 2e-5


DIFFERENT = {
    "not_renormalised": ({"num_experts": 4, "renormalize": False}, {}, "not renormalised"),
    "fewer_than_all_shards": ({"num_experts": 4}, {"granularity": 4}, "k = 2 experts are not whole copies"),
    "random_gates": (
        {"num_experts": 8, "select": {"name": "top_k", "k": 4}},
        {"granularity": 2, "gate_start": "random"},
        "different rows",
    ),
    "another_gate": ({"num_experts": 8, "gate": "cosine"}, {"granularity": 2}, "gate 'cosine'"),
    "noise": ({"num_experts": 4}, {"noise": 0.1}, "noise changes"),
    "redraw": ({"num_experts": 4}, {"redraw": 0.5}, "redraw changes"),
    "somebody_goes_without": ({"num_experts": 4, "select": {"name": "expert_choice", "k": 1}}, {}, "go without"),
    "scaled": ({"num_experts": 4, "weight_scale": 2.5}, {}, "weight_scale is 2.5, not 1"),
    "zero_experts": ({"num_experts": 4, "zero_experts": 2}, {}, "zero-computation"),
    "weighted_inputs": ({"num_experts": 4, "weights_on": "input"}, {}, "weights on what experts read"),
    "copy_experts": (
        {"num_experts": 4, "copy_experts": 2, "select": {"name": "top_k", "k": 6}},
        {"carrier": "shared"},
        "copy and constant",
    ),
    "skip_over_the_first_factor": (
        {"num_experts": 4, "layer": "cartesian", "cartesian_skip": "input"},
        {},
        "drops what the first factor",
    ),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_what_is_another_function_says_why(kind):
    routing, settings, reason = DIFFERENT[kind]
    dense = build_dense("llama")
    upcycled = upcycle(dense, routing, UpcycleSettings(**settings))
    assert len(upcycled.differences) == 1
    assert reason in upcycled.differences[0]
    assert difference(dense, upcycled.model) > 1e-3


def test_the_restoring_scale_brings_unnormalised_weights_near_the_function():
    dense = build_dense("llama")
    near = []
    for scale in ({}, {"weight_scale": 1.0}):
        model = upcycle(dense, {"num_experts": 8, "renormalize": False, **scale}).model
        for gate in model.model.gates:  # with equal logits the scale is exact
            gate.weight.data *= 1e-3
        near.append(difference(dense, model))
    assert near[0] < 1e-2 < 1 < near[1]


@pytest.mark.parametrize(
    ("layer", "granularity", "carrier"), itertools.product(("moe", "cartesian"), (1, 2), ("experts", "shared"))
)
def test_every_parameter_learns_within_three_steps(layer, granularity, carrier):
    routing = {"num_experts": 4, "layer": layer, "select": {"name": "top_k", "k": 2}, "load_balance_coef": 0.0}
    settings = UpcycleSettings(granularity=granularity, carrier=carrier)
    model = upcycle(build_dense("llama"), routing, settings).model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids_BS = torch.randint(1, 37, (4, 16), generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        optimizer.zero_grad()
        model(ids_BS, labels=ids_BS).loss.backward()
        optimizer.step()
    still = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert still == []


def test_copies_part_while_they_train():
    model = upcycle(build_dense("llama"), {"num_experts": 4}).model.train()
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.down_proj[0], experts.down_proj[1])
    ids_BS = torch.randint(1, 37, (4, 16), generator=torch.Generator().manual_seed(2))
    model(ids_BS, labels=ids_BS).loss.backward()
    assert not torch.allclose(experts.down_proj.grad[0], experts.down_proj.grad[1])


SELECTIONS = [
    {"name": "top_k", "k": 4},
    {"name": "top_k", "k": 1},
    {"name": "scheduled_top_k", "k": 1, "k_end": 2, "steps": 4},
    {"name": "top_p", "p": 0.4},
    {"name": "group_limited", "k": 4, "n_group": 2, "topk_group": 1},
    {"name": "top_c", "k": 2},
    {"name": "expert_choice", "k": 2},
    {"name": "capacity", "k": 2, "factor": 0.5},
    {"name": "sinkhorn", "k": 1},
    {"name": "base"},
    {"name": "positive"},
]


@pytest.mark.parametrize("select", SELECTIONS, ids=lambda select: f"{select['name']}-{select.get('k', '')}")
def test_no_combination_claims_more_than_it_keeps(select):
    dense = build_dense("llama")
    kept = 0
    for score, gate, granularity, carrier in itertools.product(
        ("softmax", "sigmoid", "relu", "unified", "token_softmax"),
        ("linear", "hash"),
        (1, 2),
        ("experts", "shared"),
    ):
        routing = {"num_experts": 8, "score": score, "select": select, "gate": gate}
        try:
            upcycled = upcycle(dense, routing, UpcycleSettings(granularity=granularity, carrier=carrier))
        except UserError:  # rules that do not go together
            continue
        if not upcycled.differences:
            kept += 1
            assert difference(dense, upcycled.model) < 2e-5, (routing, granularity, carrier)
    assert kept > 5


def test_a_further_factor_starts_with_the_layers_norm_and_the_shards():
    dense = build_dense("llama")
    settings = UpcycleSettings(granularity=2)
    for index, layer in enumerate(upcycle(dense, SAME["cartesian_of_three"][0], settings).model.model.layers):
        first, *others = layer.mlp.factors
        for norm, factor in zip(layer.mlp.norms, others, strict=True):
            assert torch.equal(norm.weight, dense.model.layers[index].post_attention_layernorm.weight)
            assert torch.equal(factor.experts.gate_up_proj, first.experts.gate_up_proj)
            assert not factor.experts.down_proj.any()
