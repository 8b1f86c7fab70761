"""The recurrent gate: a GRU over layers, by hand and against torch's own cell."""

from __future__ import annotations

import math

import pytest
import torch

from crossways.gates import RecurrentGate
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Softmax
from crossways.rules.select import TopK


def hand_made():
    """One dimension everywhere. Reset and update gates are one half; the candidate is tanh(x' + h)."""
    gate = RecurrentGate(1, 2, num_layers=2, state_size=1)
    gate.projection_LHD.data = torch.tensor([[[1.0]], [[10.0]]])
    gate.head_LEH.data = torch.tensor([[[2.0], [-1.0]], [[3.0], [0.0]]])
    gate.input_weight.data = torch.tensor([[0.0], [0.0], [1.0]])
    gate.state_weight.data = torch.tensor([[0.0], [0.0], [2.0]])
    return gate


def through(gate, states):
    """The routing of each layer."""
    router, previous, all_layers = Router(2, Softmax(), TopK(1), gate=gate), None, []
    for layer, x_BSD in enumerate(states):
        previous = router(x_BSD, Context(layer=layer, previous=previous))
        all_layers.append(previous)
    return all_layers


def test_two_layers_by_hand():
    first, second = through(hand_made(), [torch.tensor([[[1.0]]]), torch.tensor([[[0.05]]])])
    h1 = 0.5 * math.tanh(1.0)
    h2 = 0.5 * math.tanh(0.5 + h1) + 0.5 * h1
    torch.testing.assert_close(first.logits_TE, torch.tensor([[2 * h1, -h1]]))
    torch.testing.assert_close(second.logits_TE, torch.tensor([[3 * h2, 0.0]]))
    assert second.state.item() == pytest.approx(h2)


def test_the_cell_is_torchs():
    gate, cell = RecurrentGate(4, 2, 2, 3), torch.nn.GRUCell(3, 3)
    gate.reset_parameters(std=0.7)
    parameters = (gate.input_weight, gate.state_weight, gate.input_bias, gate.state_bias)
    for theirs, ours in zip(cell.parameters(), parameters, strict=True):
        torch.nn.init.normal_(ours)
        theirs.data = ours.data
    states = [torch.randn(2, 3, 4) for _ in range(2)]
    state_TH = torch.zeros(6, 3)
    for layer, routing in enumerate(through(gate, states)):
        state_TH = cell(states[layer].flatten(0, 1) @ gate.projection_LHD[layer].t(), state_TH)
        torch.testing.assert_close(routing.state.flatten(0, 1), state_TH)
        torch.testing.assert_close(routing.logits_TE, state_TH @ gate.head_LEH[layer].t())


def test_the_first_layer_of_a_block_starts_afresh():
    gate, x_BSD = hand_made(), torch.tensor([[[1.0]]])
    earlier = through(gate, [torch.tensor([[[9.0]]])])[0]
    afresh = gate(x_BSD, Context(layer=0, previous=earlier))
    assert torch.equal(afresh.logits_BSE, gate(x_BSD).logits_BSE)


def test_a_later_layer_must_know_the_layer_before():
    with pytest.raises(ValueError, match="layer 1 of a recurrent gate"):
        hand_made()(torch.ones(1, 1, 1), Context(layer=1))


def test_gradients_run_back_through_the_layers():
    states = [torch.ones(1, 1, 1, requires_grad=True) for _ in range(2)]
    through(hand_made(), states)[1].logits_TE.sum().backward()
    assert states[0].grad.any()


def test_shared_parts():
    own = RecurrentGate(4, 2, 3, 5)
    shared = RecurrentGate(4, 2, 3, 5, shared_projection=True, shared_head=True)
    assert own.projection_LHD.shape == (3, 5, 4)
    assert own.head_LEH.shape == (3, 2, 5)
    assert shared.projection_LHD.shape == (1, 5, 4)
    assert shared.head_LEH.shape == (1, 2, 5)
