"""Conversion to and from Hugging Face families: same logits, strict keys, and plain refusals."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from crossways.errors import UserError
from crossways.models.convert import from_mixtral, from_qwen2_moe, to_mixtral, to_qwen2_moe

QWEN_LIKE = {
    "plain": {},
    "renormalised": {"renormalize": True, "select": {"name": "top_k", "k": 3}},
    "scaled": {"renormalize": True, "weight_scale": 2.5, "shared_expert_intermediate_size": 3},
    "gated_share": {"shared_expert_intermediate_size": 3, "shared_expert_gate": True},
    "scaled_share": {"shared_expert_intermediate_size": 3, "shared_expert_scale": 0.5},
    "every_second": {"num_hidden_layers": 4, "moe_every": 2, "shared_expert_intermediate_size": 5},
    "any_layers": {"num_hidden_layers": 4, "moe_layers": [0, 3], "sharing": "all"},
    "all_layers_by_name": {"moe_layers": [0, 1], "expert_bias": True},
    "dense": {"moe_every": 0},
    "block_shared": {"num_hidden_layers": 4, "sharing": {"name": "block", "size": 2}},
    "tied": {"tie_word_embeddings": True},
    "biased_attention": {"attention_bias": True},
    "grouped_heads": {"num_key_value_heads": 1, "head_dim": 4, "rms_norm_eps": 1e-3},
    "rope": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "gelu": {"expert_activation": "geglu", "hidden_act": "gelu", "moe_every": 2},
    "cartesian_of_one": {"layer": "cartesian", "num_factors": 1, "shared_expert_intermediate_size": 3},
    "unified_one": {"score": {"name": "unified", "alpha": 1.0}},
}
TINY_FAMILY = {
    "vocab_size": 37,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def check_same_logits(one, other, tokens):
    ids_BS, mask_BS = tokens
    valid_BS = mask_BS.bool()
    ours, theirs = (model.eval()(ids_BS, attention_mask=mask_BS).logits[valid_BS] for model in (one, other))
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", QWEN_LIKE)
def test_qwen2_moe_there_and_back(tiny_model, tokens, kind):
    model = tiny_model(**QWEN_LIKE[kind])
    theirs = to_qwen2_moe(model)
    assert type(theirs) is Qwen2MoeForCausalLM
    check_same_logits(model, theirs, tokens)
    again = from_qwen2_moe(theirs)
    check_same_logits(model, again, tokens)
    assert again.config.shared_expert_intermediate_size == model.config.shared_expert_intermediate_size
    assert again.config.routed_layers == model.config.routed_layers
    # The scale moves into the experts; gates are no longer shared, biases of zero are gone.
    if kind not in ("block_shared", "cartesian_of_one", "scaled", "scaled_share", "any_layers", "all_layers_by_name"):
        for name, value in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("fields", [{}, {"tie_word_embeddings": True, "num_key_value_heads": 1}], ids=str)
def test_mixtral_there_and_back(tiny_model, tokens, fields):
    model = tiny_model(renormalize=True, **fields)
    theirs = to_mixtral(model)
    assert type(theirs) is MixtralForCausalLM
    check_same_logits(model, theirs, tokens)
    again = from_mixtral(theirs)
    check_same_logits(theirs, again, tokens)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dense", [[], [1]])
@pytest.mark.parametrize("gated", [True, False])
def test_a_qwen2_moe_of_their_own_becomes_ours(tokens, bias, dense, gated):
    config = Qwen2MoeConfig(
        **TINY_FAMILY,
        num_hidden_layers=4,
        intermediate_size=24,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=10,
        num_experts=4,
        decoder_sparse_step=1 if dense else 2,
        mlp_only_layers=dense,
        qkv_bias=bias,
    )
    theirs = Qwen2MoeForCausalLM(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "bias" in name:
                parameter.normal_()
            elif "shared_expert_gate" in name and not gated:
                parameter.zero_()
    ours = from_qwen2_moe(theirs)
    assert (ours.config.shared_expert_intermediate_size, ours.config.shared_expert_gate) == (10, gated)
    check_same_logits(theirs, ours, tokens)
    check_same_logits(theirs, to_qwen2_moe(ours), tokens)
    assert (ours.config.moe_every, ours.config.moe_layers) == ((1, [0, 2, 3]) if dense else (2, None))


def test_a_mixtral_of_their_own_becomes_ours(tokens):
    config = MixtralConfig(**TINY_FAMILY, num_hidden_layers=2, intermediate_size=12, num_local_experts=4)
    theirs = MixtralForCausalLM(config)
    check_same_logits(theirs, from_mixtral(theirs), tokens)


def test_models_that_use_what_ours_lacks_are_refused():
    base = dict(TINY_FAMILY, num_hidden_layers=2, intermediate_size=12)
    qwen = base | {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 10, "num_experts": 4}
    sliding = Qwen2MoeConfig(**qwen, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    with pytest.raises(UserError, match="sliding"):
        from_qwen2_moe(Qwen2MoeForCausalLM(sliding))
    with pytest.raises(UserError, match="sliding"):
        from_mixtral(MixtralForCausalLM(MixtralConfig(**base, num_local_experts=4, sliding_window=4)))
    with pytest.raises(UserError, match="hidden_act 'tanh'"):
        from_mixtral(MixtralForCausalLM(MixtralConfig(**base, num_local_experts=4, hidden_act="tanh")))


INEXPRESSIBLE = [
    ({"layer": "cartesian"}, "Cartesian with 2 factors"),
    ({"score": "unified"}, "its score is 'unified'"),
    ({"score": "sigmoid"}, "its score is 'sigmoid'"),
    ({"select": {"name": "top_c", "k": 2}}, "its selection is 'top_c'"),
    ({"select": {"name": "expert_choice", "k": 2}}, "its selection is 'expert_choice'"),
    ({"select": {"name": "threshold", "value": 0.2}}, "its selection is 'threshold'"),
    ({"select": {"name": "scheduled_top_k", "k": 1, "k_end": 2, "steps": 5}}, "its selection is 'scheduled_top_k'"),
    ({"gate": "cosine"}, "its gate is 'cosine'"),
    ({"gate": {"name": "linear", "bias": True}}, "its gates have biases"),
    ({"sharing": {"name": "decision", "size": 2}}, "repeat the decision of the layer before"),
    ({"expert_activation": "relu", "renormalize": True}, "is not gated"),
    ({"attention_experts": 3, "renormalize": True}, "choose among 3 experts"),
    ({"distinct_layers": 1, "renormalize": True}, "goes through its 1 layers 2 times"),
    ({"moe_latent_size": 8, "renormalize": True}, "a smaller space of width 8"),
    ({"weights_on": "input", "renormalize": True}, "weights multiply each expert's input"),
    ({"mlp_bias": True, "moe_every": 2}, "dense layers have biases"),
]


@pytest.mark.parametrize(("fields", "reason"), INEXPRESSIBLE, ids=str)
def test_what_the_families_lack_is_refused(tiny_model, fields, reason):
    model = tiny_model(**fields)
    for convert in (to_qwen2_moe, to_mixtral):
        with pytest.raises(UserError, match=reason):
            convert(model)


def test_what_one_family_lacks_is_refused(tiny_model):
    for fields, reason in (
        ({}, "not renormalised"),
        ({"renormalize": True, "moe_every": 2}, "not every layer is routed"),
        ({"renormalize": True, "moe_layers": [1]}, "not every layer is routed"),
        ({"renormalize": True, "shared_expert_intermediate_size": 4}, "shared expert"),
        ({"renormalize": True, "attention_bias": True}, "biases"),
    ):
        with pytest.raises(UserError, match=reason):
            to_mixtral(tiny_model(**fields))
    with pytest.raises(UserError, match="dense layers use 'relu'"):
        to_qwen2_moe(tiny_model(moe_every=2, hidden_act="relu"))
    biased = tiny_model(attention_bias=True)
    torch.nn.init.ones_(biased.model.layers[1].self_attn.o_proj.bias)
    with pytest.raises(UserError, match="attention output has a bias"):
        to_qwen2_moe(biased)
    of_experts = tiny_model(expert_bias=True)
    torch.nn.init.ones_(of_experts.model.layers[1].mlp.experts.gate_up_proj_bias[2])
    with pytest.raises(UserError, match="experts have biases that are not zero"):
        to_qwen2_moe(of_experts)
    perturbed = tiny_model()
    perturbed.model.routers[0].perturbation = lambda logits, allowed, decide: decide(logits, allowed)
    with pytest.raises(UserError, match="perturbation"):
        to_qwen2_moe(perturbed)


def test_no_weight_is_lost_silently(tiny_model):
    model = tiny_model()
    model.model.layers[0].register_parameter("stray", torch.nn.Parameter(torch.ones(1)))
    with pytest.raises(RuntimeError, match="stray"):
        to_qwen2_moe(model)


def test_dtype_mode_and_generation_settings_are_kept(tiny_model):
    model = tiny_model().to(torch.bfloat16).train()
    model.generation_config.temperature = 0.5
    theirs = to_qwen2_moe(model)
    assert theirs.dtype == torch.bfloat16
    assert theirs.training
    assert theirs.generation_config.temperature == 0.5


def test_the_export_loads_where_crossways_is_unknown(tiny_model, tokens, tmp_path):
    model = tiny_model(num_hidden_layers=4, sharing={"name": "block", "size": 2}, shared_expert_intermediate_size=5)
    to_qwen2_moe(model).save_pretrained(tmp_path)
    torch.save((*tokens, model(tokens[0], attention_mask=tokens[1]).logits), tmp_path / "expected.pt")
    script = """
import sys, torch
sys.modules["crossways"] = None  # importing it would raise
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids, mask, expected = torch.load(sys.argv[1] + "/expected.pt")
valid = mask.bool()
torch.testing.assert_close(model(ids, attention_mask=mask).logits[valid], expected[valid], atol=1e-5, rtol=1e-4)
print(type(model).__name__)
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=os.environ
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "Qwen2MoeForCausalLM"
