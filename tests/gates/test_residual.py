"""The gate of MoE++: the logits of the layer before are part of this layer's."""

from __future__ import annotations

import torch

from crossways.gates import LinearGate, build_gate
from crossways.gates.residual import ResidualGate
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Softmax
from crossways.rules.select import TopK


def test_by_hand():
    gate = ResidualGate(1, 2)
    gate.weight.data = torch.tensor([[1.0], [2.0]])
    gate.residual.data = torch.tensor([[0.0, 1.0], [-1.0, 0.5]])
    x_BSD = torch.tensor([[[3.0]]])
    first = Router(2, Softmax(), TopK(1), gate=gate)(x_BSD)
    assert first.logits_TE.tolist() == [[3.0, 6.0]]
    second = Router(2, Softmax(), TopK(1), gate=gate)(x_BSD, Context(previous=first))
    assert second.logits_TE.tolist() == [[3.0 + 6.0, 6.0 - 3.0 + 3.0]]


def test_without_a_layer_before_it_is_linear_and_all_gradients_exist():
    gate, x_BSD = build_gate("residual").build(8, 4), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    linear = LinearGate(8, 4)
    linear.weight.data = gate.weight.data
    assert torch.equal(gate(x_BSD), linear(x_BSD))
    gate(x_BSD).sum().backward()
    assert gate.weight.grad.any()
    assert gate.residual.grad is not None
    assert not gate.residual.grad.any()


def test_in_a_model_every_later_layer_uses_the_residual():
    from crossways.models import CrosswaysConfig, CrosswaysForCausalLM

    torch.manual_seed(0)
    config = CrosswaysConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_experts=4,
        moe_intermediate_size=8,
        gate="residual",
        initializer_range=0.3,
        pad_token_id=0,
    )
    model = CrosswaysForCausalLM(config)
    ids_BS = torch.randint(1, 30, (2, 7))
    before = model(ids_BS, output_routings=True).routings
    model(ids_BS, labels=ids_BS).loss.backward()
    assert [bool(gate.residual.grad.any()) for gate in model.model.gates] == [False, True, True]
    with torch.no_grad():
        model.model.gates[1].residual.zero_()
    after = model(ids_BS, output_routings=True).routings
    assert torch.equal(before[0].logits_TE, after[0].logits_TE)
    assert not torch.equal(before[1].logits_TE, after[1].logits_TE)
