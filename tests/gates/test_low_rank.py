"""The low-rank gate: a shared matrix plus a term per layer."""

from __future__ import annotations

import torch

from crossways.gates import LowRankGate
from crossways.routing import Context

X_BSD = torch.tensor([[[3.0, 1.0]]])


def hand_made():
    gate = LowRankGate(2, 3, num_layers=2, rank=1)
    gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    gate.up_LER.data[1] = torch.tensor([[1.0], [2.0], [0.0]])
    gate.down_LRD.data[1] = torch.tensor([[1.0, -1.0]])
    return gate


def test_by_hand():
    gate = hand_made()
    assert gate(X_BSD).tolist() == [[[3.0, 1.0, 4.0]]]
    assert gate(X_BSD, Context(layer=0)).tolist() == [[[3.0, 1.0, 4.0]]]
    # V x = 3 - 1 = 2, U V x = (2, 4, 0)
    assert gate(X_BSD, Context(layer=1)).tolist() == [[[5.0, 5.0, 4.0]]]


def test_training_starts_from_plain_sharing():
    gate = LowRankGate(2, 3, num_layers=4, rank=2)
    shared_BSE = X_BSD @ gate.weight.t()
    for layer in range(4):
        torch.testing.assert_close(gate(X_BSD, Context(layer=layer)), shared_BSE)
    assert gate.down_LRD.any()  # or no gradient would ever reach U


def test_a_layer_trains_the_base_and_its_own_term_alone():
    gate = hand_made()
    gate(X_BSD, Context(layer=1)).sum().backward()
    assert gate.weight.grad.any()
    for terms in (gate.up_LER, gate.down_LRD):
        assert terms.grad[1].any()
        assert not terms.grad[0].any()
