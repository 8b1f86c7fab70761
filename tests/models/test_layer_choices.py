"""Which layers are routed, and what their experts read, add and are weighed by: in a whole model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from crossways.gates import LinearGate
from crossways.layers import MoE
from crossways.sites import router_sites
from crossways.trace import traced

PATTERN = {"num_hidden_layers": 5, "moe_layers": [0, 1, 4], "sharing": {"name": "block", "size": [1, 2]}}


def test_routed_layers_stand_where_the_pattern_says(tiny_model, tokens):
    model = tiny_model(**PATTERN)
    assert [isinstance(layer.mlp, MoE) for layer in model.model.layers] == [True, True, False, False, True]
    assert [site.layer for site in router_sites(model)] == [0, 1, 2]
    asked: list = []
    for index, gate in enumerate(model.model.gates):
        gate.register_forward_hook(lambda *_, index=index: asked.append(index))
    with traced(model) as trace:
        model(tokens[0], attention_mask=tokens[1])
    assert asked == [0, 1, 1]
    assert trace.num_tokens == int(tokens[1].sum())


def test_a_pattern_that_is_every_nth_is_that_model(tiny_model, tokens):
    every, pattern = tiny_model(num_hidden_layers=4, moe_every=2), tiny_model(num_hidden_layers=4, moe_layers=[1, 3])
    assert torch.equal(every(tokens[0]).logits, pattern(tokens[0]).logits)


@pytest.mark.parametrize(("zero", "weights_on"), [(0, "output"), (1, "output"), (0, "input")])
def test_a_latent_layer_is_its_formula(tiny_model, zero, weights_on):
    """y = up(sum w_e E_e(down(x))) + shared(x), router and copy expert at full width; or E_e(w_e down(x))."""
    fields = {
        "moe_latent_size": 6,
        "shared_expert_intermediate_size": 5,
        "copy_experts": zero,
        "weights_on": weights_on,
        "select": {"name": "top_p", "p": 0.6},
    }
    layer, x_BSD = tiny_model(**fields).model.layers[1].mlp, torch.randn(2, 7, 16)
    layer.router.gate = LinearGate(16, 4 + zero)
    layer.router.gate.reset_parameters(1.0)
    y_BSD, (routing,) = layer(x_BSD)
    x_TD, matrix_TE = x_BSD.flatten(0, 1), routing.assignment.to_dense()
    torch.testing.assert_close(routing.logits_TE, x_TD @ layer.router.gate.weight.T)
    assert layer.experts.down_proj.shape == (4, 6, 8)
    latent_TL = x_TD @ layer.latent.down_proj.weight.T
    summed_TL = torch.zeros_like(latent_TL)
    for e in range(4):
        weight_T1 = matrix_TE[:, e : e + 1]
        read_TL = latent_TL * weight_T1 if weights_on == "input" else latent_TL
        gate_TF, up_TF = (read_TL @ layer.experts.gate_up_proj[e].T).chunk(2, -1)
        out_TL = (torch.nn.functional.silu(gate_TF) * up_TF) @ layer.experts.down_proj[e].T
        summed_TL = summed_TL + (out_TL if weights_on == "input" else weight_T1 * out_TL)
    expected_TD = summed_TL @ layer.latent.up_proj.weight.T + layer.shared_expert(x_TD)
    if zero:
        assert matrix_TE[:, 4].any()
        expected_TD = expected_TD + matrix_TE[:, 4:] * x_TD
    torch.testing.assert_close(y_BSD.flatten(0, 1), expected_TD, atol=1e-5, rtol=1e-4)


def test_a_smaller_space_as_wide_as_the_model_can_be_the_plain_layer(tiny_model, tokens):
    plain, latent = tiny_model(), tiny_model(moe_latent_size=16)
    missing, left_over = latent.load_state_dict(plain.state_dict(), strict=False)
    assert left_over == []
    assert {name.split(".mlp.")[1] for name in missing} == {"latent.down_proj.weight", "latent.up_proj.weight"}
    for layer in latent.model.layers:
        torch.nn.init.eye_(layer.mlp.latent.down_proj.weight)
        torch.nn.init.eye_(layer.mlp.latent.up_proj.weight)
    torch.testing.assert_close(latent(tokens[0]).logits, plain(tokens[0]).logits)


def test_biases_start_at_zero_and_are_kept(tiny_model, tokens, tmp_path):
    model, plain = tiny_model(expert_bias=True), tiny_model()
    biases = {name: value for name, value in model.named_parameters() if name.endswith("_proj_bias")}
    assert len(biases) == 2 * 2
    assert not any(value.any() for value in biases.values())
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name not in biases})
    torch.testing.assert_close(model(tokens[0]).logits, plain(tokens[0]).logits)
    for value in biases.values():
        torch.nn.init.normal_(value)
    logits_BSV = model(tokens[0]).logits
    assert not torch.allclose(logits_BSV, plain(tokens[0]).logits, atol=0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens[0]).logits, logits_BSV)


CHOICES = {
    "latent": {"moe_latent_size": 8},
    "bias": {"expert_bias": True},
    "input": {"weights_on": "input"},
    "all": {"moe_latent_size": 8, "expert_bias": True, "weights_on": "input", "layer": "cartesian"},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_backends_agree_in_the_model(tiny_model, tokens, choice):
    ids_BS, mask_BS = tokens
    results = []
    for backend in ("naive", "loop", "auto", "transformers:batched_mm"):
        model = tiny_model(**CHOICES[choice], experts_backend=backend, load_balance_coef=0.01)
        for name, parameter in model.named_parameters():
            if name.endswith("_proj_bias"):
                torch.nn.init.constant_(parameter, 0.3)
        output = model(ids_BS, attention_mask=mask_BS, labels=ids_BS)
        output.loss.backward()
        results.append((output.logits[mask_BS.bool()], [parameter.grad for parameter in model.parameters()]))
    (expected, expected_grads), *others = results
    for logits, grads in others:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("choice", CHOICES)
def test_padding_and_other_rows_change_nothing(tiny_model, choice):
    model = tiny_model(**CHOICES[choice])
    alone_BS = torch.tensor([[7, 3, 9, 4]])
    padded_BS = torch.tensor([[0, 0, 7, 3, 9, 4], [1, 2, 3, 4, 5, 6]])
    mask_BS = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    position_BS = (mask_BS.cumsum(-1) - 1).clamp(min=0)
    padded = model(padded_BS, attention_mask=mask_BS, position_ids=position_BS).logits[:1, 2:]
    torch.testing.assert_close(padded, model(alone_BS).logits, atol=1e-5, rtol=1e-4)
    one = model(alone_BS[:, :1]).logits  # one token: most experts have none
    torch.testing.assert_close(one, model(alone_BS).logits[:, :1], atol=1e-5, rtol=1e-4)
