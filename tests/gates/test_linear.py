"""The linear gate: plain W x, in float32 whatever the model's dtype."""

from __future__ import annotations

import pytest
import torch

from crossways.errors import UserError
from crossways.gates import Linear, LinearGate, build_gate


def test_logits_are_w_x():
    gate = LinearGate(2, 3)
    gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
    assert gate(torch.tensor([[[3.0, 4.0]]])).tolist() == [[[3.0, 8.0, 1.0]]]


def test_a_bias_is_added_if_asked_for():
    gate = build_gate({"name": "linear", "bias": True}).build(2, 2)
    assert not gate.bias.any()
    gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    gate.bias.data = torch.tensor([0.5, -0.5])
    assert gate(torch.tensor([[[3.0, 4.0]]])).tolist() == [[[3.5, 7.5]]]
    assert LinearGate(2, 2).bias is None


def test_product_is_float32_in_bfloat16_and_under_autocast():
    gate = LinearGate(64, 8).to(torch.bfloat16)
    x_BSD = torch.randn(1, 5, 64, dtype=torch.bfloat16)
    exact_BSE = (x_BSD.double() @ gate.weight.double().t()).float()
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast_BSE = gate(x_BSD)
    assert gate(x_BSD).dtype == torch.float32
    torch.testing.assert_close(gate(x_BSD), exact_BSE, atol=1e-6, rtol=1e-5)
    assert torch.equal(under_autocast_BSE, gate(x_BSD))


def test_gradient_reaches_the_weight():
    gate = LinearGate(4, 2)
    gate(torch.ones(1, 1, 4)).sum().backward()
    assert torch.equal(gate.weight.grad, torch.ones(2, 4))


def test_the_configuration_names_it():
    assert build_gate("linear") == Linear()
    gate = build_gate({"name": "linear"}).build(4, 3)
    assert isinstance(gate, LinearGate)
    assert gate.weight.shape == (3, 4)
    with pytest.raises(UserError, match="unknown gate 'liner' \\(did you mean 'linear'"):
        build_gate("liner")
