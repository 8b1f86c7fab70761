"""Layers that are gone through again: a model whose layers are copies of each other, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from crossways.models import CrosswaysForCausalLM
from crossways.sharing import Decision, PerBlock, Repeated, sharing_catalogue
from crossways.sites import router_sites
from crossways.trace import traced

KINDS = {
    "plain": {"num_hidden_layers": 6, "distinct_layers": 2},
    "one": {"num_hidden_layers": 3, "distinct_layers": 1, "tie_word_embeddings": True},
    "cartesian": {"num_hidden_layers": 4, "distinct_layers": 2, "layer": "cartesian", "router_input": "layer"},
    "some_dense": {"num_hidden_layers": 6, "distinct_layers": 3, "moe_layers": [0, 2, 3, 5]},
    "dense": {"num_hidden_layers": 4, "distinct_layers": 2, "moe_every": 0},
}


def unrolled(model):
    """The ordinary model with a copy of every parameter for each time it is used."""
    config = copy.deepcopy(model.config)
    config.distinct_layers = 0
    plain, n = CrosswaysForCausalLM(config).eval(), model.config.distinct_layers
    plans = zip(plain.config.gate_plan, model.config.gate_plan, strict=True)
    gate_of = {ours: theirs for layer, other in plans for ours, theirs in zip(layer, other, strict=True)}
    source = model.state_dict()
    plain.load_state_dict({name: source[origin(name, n, gate_of)] for name in plain.state_dict()})
    return plain, gate_of


def origin(name, n, gate_of):
    """Which parameter of the repeated model a parameter of the unrolled one copies."""
    parts = name.split(".")
    if parts[1] == "layers":
        parts[2] = str(int(parts[2]) % n)
    if parts[1] == "gates":
        parts[2] = str(gate_of[int(parts[2])])
    return ".".join(parts)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_model_with_copies_and_its_gradients_are_their_sums(tiny_model, tokens, kind):
    model = tiny_model(**KINDS[kind], load_balance_coef=0.01)
    plain, gate_of = unrolled(model)
    ids_BS, mask_BS = tokens
    ours, theirs = (each(ids_BS, attention_mask=mask_BS, labels=ids_BS) for each in (model, plain))
    torch.testing.assert_close(ours.logits, theirs.logits)
    torch.testing.assert_close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    sums = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        sums[origin(name, model.config.distinct_layers, gate_of)] += parameter.grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, sums[name], atol=1e-5, rtol=1e-3, msg=name)
    assert len(list(plain.parameters())) > len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["plain", "cartesian", "some_dense"])
def test_every_place_in_the_pass_is_a_site(tiny_model, tokens, kind):
    model = tiny_model(**KINDS[kind])
    sites, factors = router_sites(model), model.config.factors
    assert [site.router for site in sites] == model.model.routers
    assert [(site.layer, site.factor) for site in sites] == [
        (layer, factor) for layer in range(len(model.config.routed_layers)) for factor in range(factors)
    ]
    with traced(model) as trace:
        routings = model(tokens[0], output_routings=True).routings
    assert len(routings) == len(sites) == trace.num_routers
    assert not torch.equal(routings[0].logits_TE, routings[-factors].logits_TE)
    disturbed: list = []

    def note(site):
        return lambda logits_BSE, allowed_BSE, decide: disturbed.append(site) or decide(logits_BSE, allowed_BSE)

    for site in sites:
        site.router.perturbation = note(site.index)
    model(tokens[0])
    assert disturbed == [site.index for site in sites]


def test_what_a_router_learns_belongs_to_its_place(tiny_model, tokens, tmp_path):
    fields = {"bias_update_rate": 0.1, "score": "sigmoid", "select": {"name": "top_k", "k": 1}}
    model = tiny_model(**KINDS["plain"], **fields).train()
    for _ in range(5):
        model(tokens[0])
    biases = [router.bias for router in model.model.routers]
    assert len({tuple(bias.tolist()) for bias in biases}) > 2
    model.eval().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for router, bias in zip(again.model.routers, biases, strict=True):
        assert torch.equal(router.bias, bias)  # kept in float32, of repeated layers too
    assert again.model.layers[1].mlp.experts.down_proj.dtype == torch.bfloat16


def test_gradient_checkpointing_recomputes_every_round(tiny_model, tokens):
    grads = []
    for checkpointing in (False, True):
        model = tiny_model(**KINDS["plain"]).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(tokens[0], labels=tokens[0]).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.equal(ours, theirs)


def test_hidden_states_of_every_round_are_recorded_and_cached(tiny_model, tokens):
    output = tiny_model(**KINDS["plain"])(tokens[0], output_hidden_states=True, use_cache=True)
    assert len(output.hidden_states) == 7
    keys = [output.past_key_values.layers[index].keys for index in range(6)]
    assert len(output.past_key_values.layers) == 6
    assert all(key.shape[2] == tokens[0].shape[1] for key in keys)
    assert not torch.equal(keys[0], keys[2])


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_generation_with_either_cache(tiny_model, tokens, implementation):
    model = tiny_model(**KINDS["plain"])
    plain, _ = unrolled(model)
    arguments = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": implementation}
    assert torch.equal(model.generate(tokens[0], **arguments), plain.generate(tokens[0], **arguments))


def test_the_plan_of_rounds():
    plan = Repeated(Decision([2, 1]), 3)
    assert plan.plan(6, 2) == Decision([2, 1]).plan(3, 2) * 2
    assert [plan.reuses_decision(layer) for layer in range(6)] == [False, True, False] * 2
    assert [plan.position(layer) for layer in range(6)] == [0, 1, 0] * 2
    assert plan.deciding(6) == [1, 1]
    assert Repeated(PerBlock(2), 2).deciding(8) == [2]
    assert Repeated not in sharing_catalogue().values()
