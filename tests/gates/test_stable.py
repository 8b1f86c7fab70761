"""StableMoE's two stages, by hand: who chooses, who weighs, who learns."""

from __future__ import annotations

import math

import torch

from crossways.gates import StableGate
from crossways.models import CrosswaysConfig
from crossways.models.losses import auxiliary_losses
from crossways.perturb import DisableTop, perturbed
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Sigmoid
from crossways.rules.select import TopK

IDS_BS = torch.tensor([[0, 1, 0]])
X_BSD = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [3.0, 5.0]]])  # the backbone prefers experts 0, 1, 1
CHOICES = [0, 1, 1]
WORDS = [1, 0, 1]
"""What the distilled router says of the ids 0, 1, 0."""


def hand_made():
    """Backbone logits are x itself. Distilled logits are (0, log 3) for id 0 and (log 3, 0) for id 1."""
    gate = StableGate(2, 2, vocab_size=2, dim=2, freeze_after=10)
    gate.weight.data = torch.eye(2)
    gate.words_VR.data = math.log(3.0) * torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    gate.centroids_ER.data = torch.eye(2)
    return gate, Router(2, Sigmoid(), TopK(1), gate=gate)


def route(router, step, valid_BS=None):
    return router(X_BSD, Context(token_ids_BS=IDS_BS, step=step, valid_BS=valid_BS))


def weights(chosen):
    """sigmoid(w_i x) at each token's expert."""
    dense_TE = torch.zeros(3, 2)
    for token, expert in enumerate(chosen):
        dense_TE[token, expert] = X_BSD[0, token, expert].sigmoid()
    return dense_TE


def test_stage_1_routes_by_the_backbone_and_distils():
    _, router = hand_made()
    routing = route(router.train(), step=9)
    torch.testing.assert_close(routing.assignment.to_dense(), weights(CHOICES))
    # cross-entropy of choices 0, 1, 1 given (1/4, 3/4), (3/4, 1/4), (1/4, 3/4)
    expected = (math.log(4) + math.log(4) + math.log(4 / 3)) / 3
    torch.testing.assert_close(routing.gate_loss, torch.tensor(expected))
    assert not routing.fixed


def test_padding_is_not_distilled():
    _, router = hand_made()
    valid_BS = torch.tensor([[True, False, True]])
    loss = route(router.train(), 0, valid_BS).gate_loss
    torch.testing.assert_close(loss, torch.tensor((math.log(4) + math.log(4 / 3)) / 2))
    assert route(router, 0, torch.zeros_like(valid_BS)).gate_loss == 0


def test_stage_2_chooses_by_the_words_and_weighs_by_the_backbone():
    _, router = hand_made()
    routing = route(router.train(), step=10)
    torch.testing.assert_close(routing.assignment.to_dense(), weights(WORDS))
    assert routing.gate_loss is None
    assert routing.fixed


def test_evaluation_chooses_by_the_words_in_both_stages():
    _, router = hand_made()
    for step, fixed in ((0, False), (10, True)):
        routing = route(router.eval(), step)
        torch.testing.assert_close(routing.assignment.to_dense(), weights(WORDS))
        assert routing.gate_loss is None
        assert routing.fixed == fixed


def test_who_learns_in_which_stage():
    gate, router = hand_made()
    routing = route(router.train(), step=0)
    routing.gate_loss.backward()
    assert gate.weight.grad is None  # the target is no way back
    assert gate.words_VR.grad.any()
    assert gate.centroids_ER.grad.any()
    gate.zero_grad()
    for step in (0, 10):
        route(router, step).assignment.weight_P.sum().backward()
        assert gate.weight.grad.any()
        assert gate.words_VR.grad is None
        assert gate.centroids_ER.grad is None


def test_no_balance_loss_once_the_choice_is_fixed():
    _, router = hand_made()
    router.train()
    routings = [route(router, 0), route(router, 10)]
    config = CrosswaysConfig(load_balance_coef=0.5, router_z_loss_coef=0.25, gate_loss_coef=2)
    losses, total = auxiliary_losses(routings, config)
    assert {name: len(loss_R) for name, loss_R in losses.items()} == {"load_balance": 1, "router_z": 2, "gate": 1}
    expected = 0.5 * losses["load_balance"].sum() + 0.25 * losses["router_z"].sum() + 2 * routings[0].gate_loss
    torch.testing.assert_close(total, expected)


def test_a_perturbation_disturbs_what_decides():
    _, router = hand_made()
    with perturbed(router.eval(), DisableTop()):
        routing = route(router, 10)
    torch.testing.assert_close(routing.assignment.to_dense(), weights([1 - word for word in WORDS]))
