"""The model as transformers sees it: saving, generation, checkpointing, precision, outputs."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from crossways.errors import UserError
from crossways.gates import gate_catalogue
from crossways.models import CrosswaysForCausalLM, CrosswaysModel
from crossways.perturb import DisableTop, perturbed, top_pairs
from crossways.rules.score import score_catalogue
from crossways.rules.select import selection_catalogue
from crossways.sharing import sharing_catalogue

SELECTIONS = {
    "top_k": {"name": "top_k", "k": 2},
    "top_c": {"name": "top_c", "k": 1.5, "group": "sequence"},
    "top_c_batch": {"name": "top_c", "k": 0.75, "group": "batch"},
    "top_c_position": {"name": "top_c", "k": 1.5, "group": "position"},
    "expert_choice": {"name": "expert_choice", "k": 1.5},
    "expert_choice_batch": {"name": "expert_choice", "k": 2, "group": "batch"},
    "sampled_top_k": {"name": "sampled_top_k", "k": 2},
    "scheduled_top_k": {"name": "scheduled_top_k", "k": 1, "k_end": 4, "steps": 3},
    "threshold": {"name": "threshold", "k": 1.5},
    "threshold_fixed": {"name": "threshold", "value": 0.25},
    "top_p": {"name": "top_p", "p": 0.4},
    "top_p_capped": {"name": "top_p", "p": 0.8, "cap": 2},
    "positive": {"name": "positive"},
    "group_limited": {"name": "group_limited", "k": 2, "n_group": 2, "topk_group": 1},
    "switch": {"name": "capacity", "k": 1, "factor": 0.8},
    "gshard": {"name": "capacity", "k": 2, "factor": 0.8, "group": "batch", "normalize": True, "second": "random"},
    "sinkhorn": {"name": "sinkhorn", "k": 2},
    "sinkhorn_batch": {"name": "sinkhorn", "group": "batch"},
    "base": {"name": "base"},
    "base_batch": {"name": "base", "group": "batch"},
}
GATES = {
    "cosine": {"name": "cosine"},
    "cosine_usmoe": {
        "name": "cosine",
        "dim": 8,
        "temperature": 1,
        "learn_temperature": False,
        "normalize_input": False,
        "embedding_norm": 1.5,
    },
    "hash": {"name": "hash", "k": 2},
    "linear": {"name": "linear"},
    "linear_bias": {"name": "linear", "bias": True},
    "low_rank": {"name": "low_rank", "rank": 2},
    "noisy": {"name": "noisy", "zero_init": False},
    "mlp": {"name": "mlp", "width": 5},
    "random": {"name": "random"},
    "recurrent": {"name": "recurrent", "state_size": 6},
    "residual": {"name": "residual"},
    "recurrent_shared": {"name": "recurrent", "state_size": 6, "shared_projection": True, "shared_head": True},
    "stable_stage_1": {"name": "stable", "freeze_after": 5, "dim": 6},
    "stable_stage_2": {"name": "stable", "freeze_after": 1, "dim": 6},
}
SHARINGS = {
    "all": "all",
    "decision": {"name": "decision", "size": 2},
    "unequal": {"name": "block", "size": [2, 1]},
    "unequal_decision": {"name": "decision", "size": [1, 2]},
}
SCORES = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "relu": "relu",
    "unified": "unified",
    "unified_tokens": {"name": "unified", "alpha": 0.3, "expert_part": "softmax_over_tokens"},
    "sqrt_softplus": "sqrt_softplus",
    "among_top": {"name": "among_top", "k": 2},
    "token_softmax": "token_softmax",
    "token_softmax_batch": {"name": "token_softmax", "group": "batch"},
}
METHODS = {
    "deepseek_v3": {
        "score": "sigmoid",
        "select": {"name": "group_limited", "k": 2, "n_group": 2, "topk_group": 1},
        "renormalize": True,
        "weight_scale": 2.5,
        "bias_update_rate": 0.001,
        "sequence_balance_coef": 0.0001,
        "shared_expert_intermediate_size": 8,
    },
    "sigma_moe": {"score": "sigmoid", "expert_dropout": 0.05, "entropy_coef": 0.001, "expert_activation": "relu"},
    "remoe": {"score": "relu", "select": "positive", "sparsity_budget": 2},
    "moe_plus_plus": {
        "zero_experts": 1,
        "copy_experts": 1,
        "constant_experts": 2,
        "gate": "residual",
        "load_balance_coef": 0.01,
        "zero_computation_balance": 0.75,
    },
    "moe_plus_plus_cartesian": {"copy_experts": 1, "constant_experts": 1, "layer": "cartesian", "gate": "residual"},
    "base_layer": {"score": "sigmoid", "select": "base"},
    "moe_plus_plus_capacity": {
        "constant_experts": 1,
        "select": {"name": "capacity", "k": 2, "factor": 1.1, "order": "score", "zero_computation": 1, "tau": 0.75},
    },
    "shazeer": {"gate": "noisy", "renormalize": True, "importance_coef": 0.1, "load_coef": 0.1},
    "quantile": {"quantile_balancing": True, "renormalize": True},
    "jitter": {"router_jitter": 0.1, "router_dropout": 0.1},
    "gated_shared_expert": {
        "shared_expert_intermediate_size": 5,
        "shared_expert_gate": True,
        "shared_expert_scale": 0.5,
        "weight_scale": 0.5,
    },
    "sinkhorn_top1": {"score": "sigmoid", "select": {"name": "sinkhorn", "group": "batch"}},
    "shazeer_importance": {"renormalize": True, "importance_coef": 0.1},
    "any_layers": {"num_hidden_layers": 5, "moe_layers": [0, 1, 4], "sharing": {"name": "block", "size": [1, 2]}},
    "switch_head": {"attention_experts": 3},
    "switch_all": {
        "attention_projections": ["query", "key", "value", "output"],
        "attention_experts": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "qk_norm": True,
        "num_hidden_layers": 4,
        "distinct_layers": 2,
        "score": "sigmoid",
        "tie_word_embeddings": True,
    },
    "rounds": {
        "num_hidden_layers": 4,
        "distinct_layers": 2,
        "moe_layers": [1, 3],
        "score": "sigmoid",
        "bias_update_rate": 0.1,
    },
    "rounds_recurrent": {
        "num_hidden_layers": 6,
        "distinct_layers": 3,
        "layer": "cartesian",
        "sharing": {"name": "block", "size": [2, 1]},
        "select": {"name": "top_c", "k": 1.5},
        "gate": {"name": "recurrent", "state_size": 6},
    },
    "rounds_of_decisions": {
        "num_hidden_layers": 6,
        "distinct_layers": 3,
        "sharing": {"name": "decision", "size": [2, 1]},
    },
    "latent": {"moe_latent_size": 6, "shared_expert_intermediate_size": 5, "zero_experts": 1, "constant_experts": 1},
    "latent_cartesian": {"moe_latent_size": 6, "layer": "cartesian", "expert_bias": True},
    "llama_4": {"weights_on": "input", "score": "sigmoid", "select": {"name": "top_k", "k": 1}},
    "weighted_inputs_of_all": {
        "weights_on": "input",
        "moe_latent_size": 6,
        "expert_bias": True,
        "constant_experts": 1,
        "select": {"name": "top_c", "k": 1.5},
    },
    "expert_bias": {"expert_bias": True, "expert_activation": "relu"},
    "stacked_control": {"layer": "cartesian", "router_input": "layer"},
    "causal_token_softmax": {"score": "token_softmax", "causal_routing": True},
    "usmoe_tokens": {
        "score": {"name": "unified", "expert_part": "softmax_over_tokens"},
        "select": {"name": "top_c", "k": 1.5},
    },
    **{
        f"activation_{name}": {"expert_activation": name, "shared_expert_intermediate_size": 5}
        for name in ("swiglu", "geglu", "reglu", "silu", "gelu", "relu")
    },
}
KINDS = {
    "moe": {},
    "dense": {"moe_every": 0},
    "every_second": {"moe_every": 2},
    "tied": {"tie_word_embeddings": True},
    "shared_expert": {"shared_expert_intermediate_size": 5},
    "cartesian_1": {"layer": "cartesian", "num_factors": 1},
    "cartesian_2": {"layer": "cartesian", "num_factors": 2, "shared_expert_intermediate_size": 7},
    "cartesian_3_input": {"layer": "cartesian", "num_factors": 3, "cartesian_skip": "input"},
    "block": {"num_hidden_layers": 3, "sharing": {"name": "block", "size": 2}},
    "relu": {"expert_activation": "relu", "renormalize": True},
    "all_three": {
        "layer": "cartesian",
        "sharing": {"name": "block", "size": 2},
        "score": "unified",
        "select": {"name": "top_c", "k": 1.5},
    },
    **{f"score_{name}": {"score": spec} for name, spec in SCORES.items()},
    **{f"select_{name}": {"select": spec} for name, spec in SELECTIONS.items()},
    # Three layers in blocks of two and one, so that shared gates, a second layer and a fresh start all occur.
    **{
        f"gate_{name}": {"gate": spec, "num_hidden_layers": 3, "sharing": {"name": "block", "size": 2}}
        for name, spec in GATES.items()
    },
    **{f"sharing_{name}": {"sharing": spec, "num_hidden_layers": 3} for name, spec in SHARINGS.items()},
    "cartesian_decision": {"layer": "cartesian", "num_hidden_layers": 3, "sharing": {"name": "decision", "size": 2}},
    "cartesian_recurrent": {"layer": "cartesian", "sharing": "all", "gate": {"name": "recurrent", "state_size": 6}},
    **METHODS,
}


def equal_states(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_every_rule_is_among_the_kinds_tested():
    names = {spec if isinstance(spec, str) else spec["name"] for spec in SCORES.values()}
    assert set(score_catalogue()) == names
    assert set(selection_catalogue()) == {spec["name"] for spec in SELECTIONS.values()}
    assert set(gate_catalogue()) == {spec["name"] for spec in GATES.values()}
    tested = [fields.get("sharing", "layer") for fields in KINDS.values()]
    assert set(sharing_catalogue()) == {spec if isinstance(spec, str) else spec["name"] for spec in tested}


@pytest.mark.parametrize("kind", KINDS)
def test_saving_and_loading_is_exact(tiny_model, tokens, tmp_path, kind):
    model = tiny_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is CrosswaysForCausalLM
    equal_states(again, model)
    ids_BS, mask_BS = tokens
    assert torch.equal(again(ids_BS, attention_mask=mask_BS).logits, model(ids_BS, attention_mask=mask_BS).logits)
    if model.config.tie_word_embeddings:
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_a_loaded_block_shared_model_still_shares(tiny_model, tokens, tmp_path):
    model = tiny_model(num_hidden_layers=4, sharing={"name": "block", "size": 2})
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert len(again.model.gates) == 2
    gate = again.model.gates[0]
    inputs: list = []
    gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    before = again(tokens[0], output_routings=True).routings
    assert len(inputs) == 2  # layers 0 and 1, each on its own hidden state
    assert not torch.equal(inputs[0], inputs[1])
    with torch.no_grad():
        gate.weight.add_(1.0)
    after = again(tokens[0], output_routings=True).routings
    assert not torch.equal(before[0].logits_TE, after[0].logits_TE)
    expected_TE = gate(inputs[3]).flatten(0, 1)
    assert torch.equal(after[1].logits_TE, expected_TE)


def test_auto_model_loads_the_body(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is CrosswaysModel
    equal_states(body, model.model)


def test_block_of_one_is_independent_routing_bit_for_bit(tiny_model, tokens):
    ours, theirs = tiny_model(sharing={"name": "block", "size": 1}), tiny_model(sharing="layer")
    equal_states(ours, theirs)
    assert torch.equal(ours(tokens[0]).logits, theirs(tokens[0]).logits)


@pytest.mark.parametrize("skip", ["factor", "input"])
def test_a_cartesian_model_with_one_factor_is_the_moe_model(tiny_model, tokens, skip):
    plain = tiny_model(shared_expert_intermediate_size=5)
    cartesian = tiny_model(
        shared_expert_intermediate_size=5, layer="cartesian", num_factors=1, cartesian_skip=skip, calibrated=False
    )
    renamed = {
        name.replace(".mlp.", ".mlp.factors.0.") if ".mlp." in name else name: value
        for name, value in plain.state_dict().items()
    }
    cartesian.load_state_dict(renamed, strict=True)
    assert torch.equal(cartesian(tokens[0]).logits, plain(tokens[0]).logits)


def test_a_dense_model_has_no_routers(tiny_model, tokens):
    model = tiny_model(moe_every=0, load_balance_coef=0.1)
    assert model.model.routers == []
    assert len(model.model.gates) == 0
    output = model(tokens[0], labels=tokens[0])
    assert output.expert_load == ()
    assert torch.equal(output.loss, output.lm_loss)


ROUTED = [kind for kind in KINDS if kind.startswith(("select_", "score_", "gate_", "sharing_", "cartesian_decision"))]


@pytest.mark.parametrize("kind", [*ROUTED, *METHODS])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_cache_equals_a_full_causal_pass(tiny_model, tokens, kind, padded):
    model = tiny_model(**{"shared_expert_intermediate_size": 5, **KINDS[kind]})
    ids_BS, mask_BS = tokens
    mask_BS = mask_BS if padded else torch.ones_like(mask_BS)
    output = model.generate(
        ids_BS,
        attention_mask=mask_BS,
        max_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    full_BS = output.sequences[:, :-1]
    full_mask_BS = torch.cat([mask_BS, torch.ones_like(full_BS[:, mask_BS.shape[1] :])], 1)
    position_BS = (full_mask_BS.cumsum(-1) - 1).clamp(min=0)
    full = model(full_BS, attention_mask=full_mask_BS, position_ids=position_BS, causal_routing=True)
    torch.testing.assert_close(torch.stack(output.logits, 1), full.logits[:, -5:], atol=1e-5, rtol=1e-4)
    assert torch.equal(full.logits[:, -5:].argmax(-1), output.sequences[:, -5:])


def test_generation_routes_by_the_decode_twin_unless_told_otherwise(tiny_model, tokens):
    model = tiny_model(select={"name": "top_c", "k": 1.5, "group": "batch"})
    seen: list = []
    model.model.layers[0].mlp.router.register_forward_pre_hook(lambda _, args: seen.append(args[1].causal))
    model.generate(tokens[0], max_new_tokens=2)
    assert seen == [True, True]
    seen.clear()
    model.generate(tokens[0], max_new_tokens=2, causal_routing=False)
    model(tokens[0])
    assert seen == [False, False, False]


def test_causal_routing_of_the_configuration_governs_plain_passes(tiny_model, tokens):
    model = tiny_model(select={"name": "top_c", "k": 1.5})
    explicit = model(tokens[0], causal_routing=True).logits
    assert not torch.equal(model(tokens[0]).logits, explicit)
    model.config.causal_routing = True
    assert torch.equal(model(tokens[0]).logits, explicit)
    edited = tokens[0].clone()
    edited[:, 5:] = 1
    torch.testing.assert_close(model(edited).logits[:, :5], explicit[:, :5], atol=1e-5, rtol=1e-4)


def test_an_uncalibrated_model_refuses_to_generate(tiny_model, tokens):
    model = tiny_model(calibrated=False, select={"name": "top_c", "k": 1.5})
    with pytest.raises(UserError, match="calibrate"):
        model.generate(tokens[0], max_new_tokens=1)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beams": 3}, {"do_sample": False}], ids=str)
def test_ways_of_decoding_run(tiny_model, tokens, options):
    model = tiny_model(**KINDS["all_three"])
    out_BS = model.generate(tokens[0], attention_mask=tokens[1], max_new_tokens=4, **options)
    assert out_BS.shape == (3, 13)
    assert torch.equal(out_BS[:, :9], tokens[0])


def test_sampling_in_training_mode_does_not_move_the_cutoff(tiny_model, tokens):
    model = tiny_model(select={"name": "top_c", "k": 1.5}).train()
    before_C = model.model.routers[0].cutoff.clone()
    model.generate(tokens[0], max_new_tokens=3)
    assert torch.equal(model.model.routers[0].cutoff, before_C)
    model(tokens[0])
    assert not torch.equal(model.model.routers[0].cutoff, before_C)


@pytest.mark.parametrize("layer", ["moe", "cartesian"])
def test_padding_changes_no_valid_logit(tiny_model, tokens, layer):
    ids_BS, mask_BS = tokens
    for kind in ROUTED:
        model = tiny_model(**(KINDS[kind] | {"layer": layer}))
        other_BS = torch.where(mask_BS.bool(), ids_BS, 5)
        ours = model(ids_BS, attention_mask=mask_BS, output_routings=True)
        theirs = model(other_BS, attention_mask=mask_BS)
        valid_BS = mask_BS.bool()
        torch.testing.assert_close(ours.logits[valid_BS], theirs.logits[valid_BS], atol=1e-5, rtol=1e-4)
        for routing in ours.routings:
            assert not routing.assignment.to_mask()[~valid_BS.flatten()].any()


@pytest.mark.parametrize(
    "kind",
    ["all_three", "select_threshold", "cartesian_2", "select_top_k", "select_scheduled_top_k", "cartesian_decision"]
    + ["select_gshard", "score_token_softmax", *METHODS]
    + [kind for kind in KINDS if kind.startswith(("gate_", "sharing_"))],
)
def test_gradient_checkpointing_changes_nothing(tiny_model, tokens, kind):
    fields = KINDS[kind] | {"load_balance_coef": 0.1, "router_z_loss_coef": 0.1, "cutoff_momentum": 0.5}
    results = []
    for checkpointing in (False, True):
        model = tiny_model(**fields).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(1)  # some methods sample in training
        for _ in range(2):  # the second step starts from a moved cutoff
            loss = model(tokens[0], attention_mask=tokens[1], labels=tokens[0], use_cache=False).loss
            loss.backward()
        cutoffs = [buffer.clone() for router in model.model.routers for buffer in router.buffers()]
        results.append((loss, [p.grad for p in model.parameters()], cutoffs))
    (loss, gradients, cutoffs), (loss_c, gradients_c, cutoffs_c) = results
    assert torch.equal(loss, loss_c)
    for one, other in zip(gradients, gradients_c, strict=True):
        assert (one is None) == (other is None)  # a frozen router has no gradient
        if one is not None:
            torch.testing.assert_close(one, other)
    assert len(cutoffs) == len(cutoffs_c)
    for one, other in zip(cutoffs, cutoffs_c, strict=True):
        assert torch.equal(one, other)


def test_reentrant_checkpointing_is_refused(tiny_model):
    with pytest.raises(UserError, match="use_reentrant=False"):
        tiny_model().gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match="use_reentrant=False"):
        tiny_model().gradient_checkpointing_enable({"preserve_rng_state": False})


NO_GRADIENT = {"gate_stable_stage_2": ("words_VR", "centroids_ER")}
"""Parameters that are frozen for good."""


@pytest.mark.parametrize(
    "kind",
    ["block", "cartesian_2", "all_three", "select_expert_choice", "score_sigmoid", "cartesian_decision"]
    + [kind for kind in KINDS if kind.startswith(("gate_", "sharing_")) or kind in METHODS],
)
def test_gradients_reach_every_parameter_that_learns(tiny_model, tokens, kind):
    # A recurrent gate that only one layer asks has no state to weigh, so its state weights would learn nothing.
    model = tiny_model(**(KINDS[kind] | ({"sharing": "all"} if "recurrent" in kind else {}))).train()
    if kind == "gate_low_rank":  # from zero, its second factor would get no gradient in the first step
        for gate in model.model.gates:
            torch.nn.init.normal_(gate.up_LER)
    plan = model.config.gate_plan
    first_gates = tuple(f"model.gates.{g}." for g in plan[0] if not any(g in later for later in plan[1:]))
    model(tokens[0], labels=tokens[0]).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith(NO_GRADIENT.get(kind, ())) and kind in NO_GRADIENT:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            learns = not (name.endswith(".residual") and name.startswith(first_gates))  # nothing stands before it
            assert parameter.grad.any() == learns, name


@pytest.mark.parametrize(
    "kind", ["moe", "all_three", "select_expert_choice", *(f"gate_{name}" for name in GATES), "sharing_decision"]
)
def test_bfloat16_trains_and_keeps_the_cutoff(tiny_model, tokens, tmp_path, kind):
    model = tiny_model(load_balance_coef=0.1, **KINDS[kind])
    exact = [router.cutoff.clone() for router in model.model.routers if router.has_cutoff]
    model.save_pretrained(tmp_path)
    loaded = CrosswaysForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for half in (loaded, copy.deepcopy(model).to(torch.bfloat16)):
        assert half.lm_head.weight.dtype == torch.bfloat16
        kept = [router.cutoff for router in half.model.routers if router.has_cutoff]
        assert all(torch.equal(one, other) for one, other in zip(kept, exact, strict=True))
        output = half.train()(tokens[0], attention_mask=tokens[1], labels=tokens[0], output_routings=True)
        output.loss.backward()
        assert output.loss.isfinite()
        assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)
        assert all(routing.logits_TE.dtype == torch.float32 for routing in output.routings)
        assert all(router.cutoff.dtype == torch.float32 for router in half.model.routers if router.has_cutoff)


def test_autocast_trains(tiny_model, tokens):
    model = tiny_model(load_balance_coef=0.1, **KINDS["all_three"]).train()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(tokens[0], labels=tokens[0], output_routings=True)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(routing.scores_TE.dtype == torch.float32 for routing in output.routings)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", [*METHODS, *(f"select_{name}" for name in SELECTIONS)])
def test_disabling_the_top_expert_works_with_every_rule(tiny_model, tokens, kind):
    model = tiny_model(**KINDS[kind])
    usual = model(tokens[0], attention_mask=tokens[1], output_routings=True).routings[0]
    with perturbed(model, DisableTop(1)):
        output = model(tokens[0], attention_mask=tokens[1], output_routings=True)
    disturbed_TE = output.routings[0].assignment.to_mask()
    assert not (disturbed_TE & top_pairs(usual.assignment, 1)).any()
    assert not disturbed_TE[~tokens[1].bool().flatten()].any()
    assert output.logits.isfinite().all()


def test_hidden_states_and_attentions(tiny_model, tokens):
    model = tiny_model(**KINDS["cartesian_2"])
    model.set_attn_implementation("eager")
    output = model(tokens[0], output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3
    assert all(h.shape == (3, 9, 16) for h in output.hidden_states)
    assert [a.shape for a in output.attentions] == [(3, 2, 9, 9)] * 2
    assert isinstance(model(tokens[0], return_dict=False), tuple)


def test_executed_load_is_returned_and_routings_on_request(tiny_model, tokens):
    model = tiny_model(**KINDS["cartesian_2"])
    output = model(tokens[0], attention_mask=tokens[1], output_routings=True)
    assert len(output.expert_load) == len(output.routings) == len(model.model.routers) == 4
    for load_E, routing in zip(output.expert_load, output.routings, strict=True):
        assert load_E.sum() == 2 * tokens[1].sum()
        assert torch.equal(load_E, routing.assignment.to_mask().sum(0))
    assert model(tokens[0]).routings is None


def test_copies_and_pickles_are_exact(tiny_model, tokens):
    model = tiny_model(**KINDS["all_three"])
    for other in (copy.deepcopy(model), pickle.load(io.BytesIO(pickle.dumps(model)))):
        equal_states(other, model)
        assert torch.equal(other(tokens[0]).logits, model(tokens[0]).logits)
        assert other.model.gates[0] is not model.model.gates[0]


def test_embeddings_may_replace_token_ids(tiny_model, tokens):
    model = tiny_model()
    embedded_BSD = model.get_input_embeddings()(tokens[0])
    assert torch.equal(model(inputs_embeds=embedded_BSD).logits, model(tokens[0]).logits)
    with pytest.raises(ValueError, match="exactly one"):
        model(tokens[0], inputs_embeds=embedded_BSD)


def test_last_logits_alone(tiny_model, tokens):
    model = tiny_model()
    torch.testing.assert_close(model(tokens[0], logits_to_keep=2).logits, model(tokens[0]).logits[:, -2:])


def test_the_compiled_model_gives_the_same(tiny_model, tokens):
    model = tiny_model()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens[0]).logits, model(tokens[0]).logits)
