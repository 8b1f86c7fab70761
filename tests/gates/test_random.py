"""The random gate: fixed, invisible to optimizers, part of the checkpoint."""

from __future__ import annotations

import torch

from crossways.gates import RandomGate, build_gate


def test_logits_are_w_x():
    gate = RandomGate(2, 3)
    gate.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]))
    assert gate(torch.tensor([[[3.0, 4.0]]])).tolist() == [[[3.0, 8.0, 1.0]]]


def test_the_matrix_is_no_parameter_but_is_saved():
    gate = RandomGate(4, 3)
    assert not list(gate.parameters())
    assert list(gate.state_dict()) == ["weight"]
    x_BSD = torch.randn(1, 2, 4, requires_grad=True)
    gate(x_BSD).sum().backward()
    assert gate.weight.grad is None
    torch.testing.assert_close(x_BSD.grad, gate.weight.sum(0).expand(1, 2, 4))


def test_scale_widens_the_initialisation():
    gate = build_gate({"name": "random", "scale": 5.0}).build(100, 100)
    gate.reset_parameters(std=0.2)
    assert abs(gate.weight.std().item() - 1.0) < 0.05
