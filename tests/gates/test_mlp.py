"""The gate with a hidden layer, by hand."""

from __future__ import annotations

import math

import torch

from crossways.gates import MlpGate, build_gate


def test_by_hand():
    gate = MlpGate(2, 2, 2)
    gate.hidden_weight.data = torch.tensor([[1.0, 1.0], [0.0, 2.0]])
    gate.bias.data = torch.tensor([0.5, -1.0])
    gate.weight.data = torch.tensor([[1.0, 0.0], [1.0, -3.0]])
    logits_BSE = gate(torch.tensor([[[0.25, 0.25]]]))
    one, half = math.tanh(1.0), math.tanh(-0.5)
    torch.testing.assert_close(logits_BSE, torch.tensor([[[one, one - 3 * half]]]))


def test_the_hidden_width_is_the_models():
    assert build_gate("mlp").build(6, 3).hidden_weight.shape == (6, 6)
    assert build_gate({"name": "mlp", "width": 2}).build(6, 3).weight.shape == (3, 2)
