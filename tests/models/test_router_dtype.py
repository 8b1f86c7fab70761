"""Routers in float64: logits, scores and choices in it, weights, losses and experts in what they always are."""

from __future__ import annotations

import pytest
import torch

from crossways.errors import UserError
from crossways.gates import LinearGate, build_gate
from crossways.models import CrosswaysForCausalLM
from crossways.router import Router
from crossways.rules.score import Softmax
from crossways.rules.select import TopK, build_selection

NEAR = 1e-9
"""Far below what float32 tells apart at 1."""


def near_tie(dtype, select, tokens=1):
    """Two experts whose logits are 1 and 1 + NEAR for every token."""
    gate = LinearGate(2, 2)
    gate.weight.data = torch.tensor([[1.0, 0.0], [1.0, NEAR]])
    router = Router(2, Softmax(), select, dtype=dtype, gate=gate)
    return router(torch.ones(1, tokens, 2))


@pytest.mark.parametrize("tokens", [1, 4096])  # many tokens are chosen for by compiled code
@pytest.mark.parametrize(
    "rule", [{"name": "top_k", "k": 1}, {"name": "top_c", "k": 1}, {"name": "expert_choice", "k": 1}], ids=str
)
def test_a_near_tie_is_told_apart(rule, tokens):
    select = build_selection(rule)
    exact = near_tie(torch.float64, select, tokens)
    assert exact.scores_TE.dtype == exact.logits_TE.dtype == exact.choice_TE.dtype == torch.float64
    assert exact.logits_TE[0, 1] > exact.logits_TE[0, 0]
    blurred = near_tie(torch.float32, select, tokens)
    assert blurred.logits_TE[0, 1] == blurred.logits_TE[0, 0]
    if rule["name"] == "top_k":
        assert exact.assignment.load_E().tolist() == [0, tokens]
        assert blurred.assignment.load_E().tolist() == [tokens, 0]
    elif rule["name"] == "top_c":
        assert exact.assignment.load_E()[1] == tokens


GATES = ["linear", "cosine", "mlp", "residual", "low_rank", "recurrent"]
GATES += [{"name": "noisy", "zero_init": False}, {"name": "linear", "bias": True}]


@pytest.mark.parametrize("gate", GATES, ids=str)
def test_every_gate_computes_in_float64(gate):
    torch.manual_seed(0)
    module = build_gate(gate).build(8, 4).eval()
    x_BSD = torch.randn(2, 3, 8)
    router = Router(4, Softmax(), TopK(2), dtype=torch.float64, gate=module).eval()
    exact_TE = router(x_BSD).logits_TE
    reference_TE = Router(4, Softmax(), TopK(2), dtype=torch.float64, gate=module.double())(x_BSD.double()).logits_TE
    torch.testing.assert_close(exact_TE, reference_TE, rtol=1e-14, atol=1e-14)
    assert not torch.equal(exact_TE, exact_TE.float().double())


def test_scores_are_the_float64_reference_and_weights_float32():
    torch.manual_seed(0)
    gate = LinearGate(8, 4)
    gate.reset_parameters(std=1.0)
    x_BSD = torch.randn(2, 3, 8, dtype=torch.bfloat16)
    routing = Router(4, Softmax(), TopK(2), dtype=torch.float64, gate=gate, renormalize=True)(x_BSD)
    reference_TE = (x_BSD.double() @ gate.weight.double().t()).softmax(-1).flatten(0, 1)
    torch.testing.assert_close(routing.scores_TE, reference_TE, rtol=1e-14, atol=0)
    assert routing.assignment.weight_P.dtype == torch.float32
    torch.testing.assert_close(routing.assignment.weight_sum_T(), torch.ones(6))


@pytest.mark.parametrize("fields", [{}, {"score": "sigmoid", "load_balance_probs": "scores"}], ids=str)
def test_a_model_trains_like_one_in_float32(tiny_config, fields):
    losses = {
        "load_balance_coef": 0.01,
        "sequence_balance_coef": 0.01,
        "router_z_loss_coef": 0.001,
        "importance_coef": 0.1,
        "device_balance_coef": 0.1,
        "expert_groups": 2,
        "bias_update_rate": 0.001,
    }
    ids_BS = torch.randint(1, 37, (3, 9))
    grads = {}
    for dtype in ("float32", "float64"):
        torch.manual_seed(0)
        model = CrosswaysForCausalLM(tiny_config(router_dtype=dtype, **losses, **fields)).train()
        loss = model(ids_BS, labels=ids_BS).loss
        assert loss.dtype == torch.float32
        loss.backward()
        grads[dtype] = [parameter.grad for parameter in model.parameters()]
        assert all(grad.dtype == torch.float32 for grad in grads[dtype])
    for single, double in zip(grads["float32"], grads["float64"], strict=True):
        torch.testing.assert_close(double, single, rtol=1e-3, atol=1e-5)
    assert model.model.gates[0].weight.grad.abs().sum() > 0


def test_it_is_saved_and_loaded(tiny_config, tmp_path, tokens):
    model = CrosswaysForCausalLM(tiny_config(router_dtype="float64")).eval()
    model.save_pretrained(tmp_path)
    loaded = CrosswaysForCausalLM.from_pretrained(tmp_path).eval()
    ids_BS, mask_BS = tokens
    assert loaded.config.router_dtype == "float64"
    theirs, ours = (m(ids_BS, attention_mask=mask_BS, output_routings=True) for m in (loaded, model))
    assert theirs.routings[0].logits_TE.dtype == torch.float64
    assert torch.equal(theirs.logits, ours.logits)


def test_other_dtypes_are_refused(tiny_config):
    with pytest.raises(UserError, match="router_dtype must be one of"):
        tiny_config(router_dtype="bfloat16")
