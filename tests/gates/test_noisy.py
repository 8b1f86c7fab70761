"""Noisy top-k gating against equations 3 to 5 of its paper."""

from __future__ import annotations

import math

import torch

from crossways.gates import NoisyGate
from crossways.router import Router
from crossways.rules.score import Softmax
from crossways.rules.select import TopK


def hand_made():
    gate = NoisyGate(2, 3)
    gate.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    gate.noise_weight.data = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-50.0, 0.0]])
    return gate


X_BSD = torch.tensor([[[3.0, 1.0]]])


def test_no_noise_in_evaluation():
    assert hand_made().eval()(X_BSD).tolist() == [[[3.0, 1.0, 4.0]]]


def test_noise_has_the_learnt_scale_in_training():
    gate = hand_made().train()
    torch.manual_seed(0)
    noisy_NE = gate(X_BSD.expand(1, 20000, 2)).logits_BSE[0]
    torch.testing.assert_close(noisy_NE.mean(0), torch.tensor([3.0, 1.0, 4.0]), atol=0.1, rtol=0)
    scales = torch.tensor([math.log(2), math.log1p(math.exp(3.0)), 0.0])  # softplus of 0, 3, -150
    torch.testing.assert_close(noisy_NE.std(0), scales, atol=0.05, rtol=0)


def test_every_token_and_expert_has_noise_of_its_own():
    gate = NoisyGate(2, 3).train()  # zeros: the noise alone, scaled by log 2
    torch.manual_seed(0)
    expected_BSE = torch.randn(2, 5, 3) * math.log(2)
    torch.manual_seed(0)
    torch.testing.assert_close(gate(X_BSD.expand(2, 5, 2)).logits_BSE, expected_BSE)


def test_the_scale_is_learnt_in_training_alone():
    gate = hand_made().train()
    gate(X_BSD).logits_BSE.sum().backward()
    assert gate.noise_weight.grad[:2].any()
    gate.zero_grad()
    gate.eval()(X_BSD).sum().backward()
    assert gate.noise_weight.grad is None
    assert gate.weight.grad.any()


def test_the_noise_is_handed_on_in_training_alone():
    gate = hand_made().train()
    said = gate(X_BSD)
    assert said.noise.clean.tolist() == [[[3.0, 1.0, 4.0]]]
    torch.testing.assert_close(said.noise.scale, torch.tensor([[[math.log(2), math.log1p(math.exp(3.0)), 0.0]]]))
    drawn_BSE = (said.logits_BSE - said.noise.clean)[..., :2] / said.noise.scale[..., :2]
    torch.manual_seed(3)
    again = gate(X_BSD)
    torch.manual_seed(3)
    torch.testing.assert_close(again.logits_BSE, again.noise.clean + torch.randn(1, 1, 3) * again.noise.scale)
    assert drawn_BSE.all()
    router = Router(3, Softmax(), TopK(2), gate=gate)
    assert router.train()(X_BSD).noise.clean.shape == (1, 3)
    assert router.eval()(X_BSD).noise is None


def test_weights_are_the_softmax_over_those_kept():
    router = Router(3, Softmax(), TopK(2), renormalize=True, gate=hand_made()).eval()
    expected = torch.tensor([[math.exp(3.0), 0.0, math.exp(4.0)]]) / (math.exp(3.0) + math.exp(4.0))
    torch.testing.assert_close(router(X_BSD).assignment.to_dense(), expected)


def test_it_starts_from_zero_unless_told():
    gate = NoisyGate(4, 3)
    gate.reset_parameters(std=0.5)
    assert not gate.weight.any()
    assert not gate.noise_weight.any()
    other = NoisyGate(4, 3, zero_init=False)
    assert other.weight.all()
    assert other.noise_weight.all()
