"""What cannot be upcycled is refused with the reason, and the dense model stays as it is."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
)

from crossways.errors import UserError
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.models.convert import to_mixtral, to_qwen2_moe
from crossways.surgery.upcycle import UpcycleSettings, upcycle

TINY_DENSE = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}


def llama(**fields):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(TINY_DENSE | {"initializer_range": 0.3} | fields))).eval()


REFUSED = {
    "olmo2": (lambda: AutoModelForCausalLM.from_config(Olmo2Config(**TINY_DENSE)), "norms stand after attention"),
    "smollm3": (lambda: AutoModelForCausalLM.from_config(SmolLM3Config(**TINY_DENSE)), "no rotary positions"),
    "gpt2": (lambda: AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=1)), "learnt"),
    "mlp_bias": (lambda: llama(mlp_bias=True), "mlp_bias"),
    "activation": (lambda: llama(hidden_act="gelu_pytorch_tanh"), "'gelu_pytorch_tanh'"),
    "mistral": (
        lambda: MistralForCausalLM(MistralConfig(**TINY_DENSE, sliding_window=8)),
        "slides over 8 tokens.*now 64",
    ),
    "qwen2": (
        lambda: Qwen2ForCausalLM(
            Qwen2Config(**TINY_DENSE, use_sliding_window=True, sliding_window=8, max_window_layers=1)
        ),
        "slides over 8 tokens",
    ),
    "rounds": (
        lambda: CrosswaysForCausalLM(CrosswaysConfig(**TINY_DENSE, moe_every=0, distinct_layers=1)),
        "its 1 layers 2 times",
    ),
    "routed": (
        lambda: CrosswaysForCausalLM(CrosswaysConfig(**TINY_DENSE, moe_intermediate_size=8)),
        "routed already",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_is_not_understood(kind):
    build, reason = REFUSED[kind]
    with pytest.raises(UserError, match=reason):
        upcycle(build(), {"num_experts": 4})


WRONG = {
    "width_does_not_divide": (
        {"num_experts": 5, "select": {"name": "top_k", "k": 5}},
        {"granularity": 5},
        "24 routed",
    ),
    "everything_shared": ({"shared_expert_intermediate_size": 24}, {}, "0 routed neurons"),
    "experts_no_multiple": ({"num_experts": 6}, {"granularity": 4}, "6 is no multiple of granularity = 4"),
    "dense_field": ({"hidden_size": 32}, {}, "hidden_size follows from the dense model"),
    "own_field": ({"moe_intermediate_size": 12}, {}, "moe_intermediate_size follows"),
    "no_layer": ({"moe_every": 0}, {}, "no layer would be routed"),
    "smaller_space": ({"moe_latent_size": 4}, {}, "moe_latent_size = 4 is not 0"),
    "heads": ({"attention_experts": 3}, {}, "attention_experts = 3 is not 0"),
    "rounds": ({"distinct_layers": 1}, {}, "distinct_layers = 1 is not 0"),
    "contradiction": ({"moe_layers": [1], "moe_every": 2}, {}, "contradict"),
    "groups_without_rows": (
        {"num_experts": 4, "gate": "cosine"},
        {"granularity": 2, "gate_start": "groups"},
        "linear",
    ),
    "centres_of_copies": ({"num_experts": 4}, {"granularity": 2, "gate_start": "centres"}, "2 copies"),
    "carrier_width": ({"shared_expert_intermediate_size": 8}, {"carrier": "shared"}, "has its width, 24"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_impossible_wishes(kind):
    routing, settings, reason = WRONG[kind]
    with pytest.raises(UserError, match=reason):
        upcycle(llama(), routing, UpcycleSettings(**settings))


def test_the_dense_model_is_not_touched_and_not_shared():
    dense = llama()
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    model = upcycle(dense, {"num_experts": 4, "layer": "cartesian"}).model
    for parameter in model.parameters():
        parameter.data.fill_(7.0)
    for name, weight in dense.state_dict().items():
        assert torch.equal(weight, before[name]), name


def test_dtype_and_seed_are_kept():
    dense = llama().to(torch.bfloat16)
    state = torch.random.get_rng_state()
    one, two, other = (upcycle(dense, {"num_experts": 4}, UpcycleSettings(seed=seed)).model for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert {parameter.dtype for parameter in one.parameters()} == {torch.bfloat16}
    gates = [model.model.gates[0].weight for model in (one, two, other)]
    assert torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])


def test_centres_point_where_their_neurons_do():
    dense = llama()
    model = upcycle(dense, {"num_experts": 4}, UpcycleSettings(granularity=4)).model
    for index, layer in enumerate(model.model.layers):
        gate_EWD = layer.mlp.experts.gate_up_proj[:, :6]
        cosine_E = torch.cosine_similarity(model.model.gates[index].weight, gate_EWD.mean(1), dim=1)
        torch.testing.assert_close(cosine_E, torch.ones(4))


@pytest.mark.parametrize("to", [to_qwen2_moe, to_mixtral])
def test_the_result_runs_as_a_family_of_transformers(to, ids_BS):
    dense = llama(tie_word_embeddings=True)
    routing = {"num_experts": 4, "select": {"name": "top_k", "k": 2}}
    model = upcycle(dense, routing, UpcycleSettings(granularity=2)).model
    assert model.config.weight_scale == 2.0
    with torch.no_grad():
        torch.testing.assert_close(to(model)(ids_BS).logits, dense(ids_BS).logits, atol=2e-5, rtol=1e-4)


def test_generation_is_the_dense_models(ids_BS):
    dense = llama()
    model = upcycle(dense, {"num_experts": 4, "layer": "cartesian"}).model
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids_BS, **options), dense.generate(ids_BS, **options))
