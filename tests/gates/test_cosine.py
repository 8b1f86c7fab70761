"""The cosine gate against numbers worked out by hand, in the forms of X-MoE and of USMoE's code."""

from __future__ import annotations

import math

import pytest
import torch

from crossways.gates import CosineGate, build_gate

USMOE = {"temperature": 1.0, "learn_temperature": False, "normalize_input": False, "embedding_norm": 1.5}


def hand_made(**fields):
    """P the identity; embeddings along the first axis, against the second, and on the diagonal."""
    gate = CosineGate(2, 3, 2, **fields).eval()
    gate.projection.data = torch.eye(2)
    gate.embeddings.data = torch.tensor([[2.0, 0.0], [0.0, -5.0], [1.0, 1.0]])
    return gate


X_BSD = torch.tensor([[[3.0, 4.0]]])  # norm 5, direction (0.6, 0.8)


def test_xmoe_by_hand():
    logits_BSE = hand_made(temperature=0.5)(X_BSD)
    expected = torch.tensor([[[0.6, -0.8, 1.4 / math.sqrt(2)]]]) / 0.5
    torch.testing.assert_close(logits_BSE, expected)


def test_training_hands_on_the_cosines_whatever_the_temperature():
    for fields in ({"temperature": 0.5}, {"temperature": 0.07}, {"temperature": 0.5, "learn_temperature": False}):
        gate = hand_made(**fields).train()
        out = gate(X_BSD)
        torch.testing.assert_close(out.cosine_BSE, torch.tensor([[[0.6, -0.8, 1.4 / math.sqrt(2)]]]))
        torch.testing.assert_close(out.logits_BSE, out.cosine_BSE / fields["temperature"])
    out.cosine_BSE.sum().backward()
    assert gate.embeddings.grad.abs().sum() > 0


def test_usmoe_by_hand():
    logits_BSE = hand_made(**USMOE)(X_BSD)
    torch.testing.assert_close(logits_BSE, torch.tensor([[[3.0, -4.0, 7 / math.sqrt(2)]]]))


def test_unprojected_by_hand():
    gate = CosineGate(2, 3, None, temperature=1.0, learn_temperature=False, normalize_input=False).eval()
    gate.embeddings.data = torch.tensor([[2.0, 0.0], [0.0, -5.0], [1.0, 1.0]])
    torch.testing.assert_close(gate(X_BSD), torch.tensor([[[3.0, -4.0, 7 / math.sqrt(2)]]]))
    assert gate.train()(X_BSD).logits_BSE.shape == (1, 1, 3)
    assert gate.embeddings[0].tolist() == [2.0, 0.0]  # no norm is put back
    assert [name for name, _ in gate.named_parameters()] == ["embeddings"]
    assert build_gate({"name": "cosine", "project": False, "dim": 5}).build(8, 4).embeddings.shape == (4, 8)


def test_a_fixed_temperature_divides_too():
    logits_BSE = hand_made(temperature=0.5, learn_temperature=False)(X_BSD)
    torch.testing.assert_close(logits_BSE, hand_made(temperature=0.5)(X_BSD))


def test_the_projection_comes_before_the_norm():
    gate = hand_made(temperature=1.0)
    gate.projection.data = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # P x = (4, 0)
    torch.testing.assert_close(gate(X_BSD), torch.tensor([[[1.0, 0.0, 1 / math.sqrt(2)]]]))


def test_size_of_input_and_embeddings_does_not_matter_to_xmoe():
    gate = hand_made()
    before_BSE = gate(X_BSD)
    gate.embeddings.data *= torch.tensor([[7.0], [0.1], [3.0]])
    torch.testing.assert_close(gate(100 * X_BSD), before_BSE)


def test_gradient_of_the_temperature():
    gate = hand_made(temperature=0.5)
    gate(X_BSD)[..., :2].sum().backward()
    # d/dtau of (0.6 - 0.8) / tau is 0.2 / tau^2
    torch.testing.assert_close(gate.temperature.grad, torch.tensor([0.8]))
    assert not hasattr(hand_made(**USMOE), "temperature")


def test_a_temperature_driven_below_zero_does_not_turn_the_choice_round():
    gate = hand_made()
    gate.temperature.data.fill_(-1.0)
    assert gate(X_BSD).argmax() == 2
    assert gate(X_BSD).isfinite().all()


def test_norms_are_put_back_in_training_only_and_change_no_logit():
    gate = hand_made(**USMOE)
    before_BSE = gate(X_BSD)
    assert gate.embeddings[0].tolist() == [2.0, 0.0]
    torch.testing.assert_close(gate.train()(X_BSD).logits_BSE, before_BSE)
    torch.testing.assert_close(gate.embeddings.detach().norm(dim=-1), torch.full((3,), 1.5))
    assert gate.embeddings[0].tolist() == [1.5, 0.0]
    once = gate.embeddings.detach().clone()
    gate(X_BSD)
    assert torch.equal(gate.embeddings, once)


def test_two_passes_before_one_backward():
    gate = hand_made(**USMOE).train()
    (gate(X_BSD).logits_BSE + gate(2 * X_BSD).logits_BSE).sum().backward()
    assert gate.embeddings.grad.isfinite().all()


@pytest.mark.parametrize(("experts", "dim"), [(32, 16), (16, 8), (1, 1)])
def test_the_dimension_is_half_the_number_of_experts(experts, dim):
    assert build_gate("cosine").build(8, experts).embeddings.shape == (experts, dim)
    assert build_gate({"name": "cosine", "dim": 3}).build(8, experts).projection.shape == (3, 8)


def test_initialisation():
    gate = build_gate({"name": "cosine", "dim": 8, **USMOE}).build(8, 4)
    unit_ER = gate.embeddings.detach() / 1.5
    torch.testing.assert_close(unit_ER @ unit_ER.t(), torch.eye(4), atol=1e-5, rtol=0)
    assert build_gate({"name": "cosine", "temperature": 0.07}).build(8, 4).temperature.item() == pytest.approx(0.07)
