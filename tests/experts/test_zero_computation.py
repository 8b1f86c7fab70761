"""Zero-computation experts, written out pair by pair, and within a layer."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.assignment import Assignment
from crossways.experts.module import Experts
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.gates import LinearGate
from crossways.layers import MoE
from crossways.router import Router
from crossways.rules.score import Softmax
from crossways.rules.select import TopK


def written_out(module, x_TD, weights_TE):
    y_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        for e, weight in enumerate(weights_TE[t]):
            if e < module.zero:
                out_D = torch.zeros_like(x_D)
            elif e < module.zero + module.copy:
                out_D = x_D
            else:
                n = e - module.zero - module.copy
                a1, a2 = (module.blend[n] @ x_D).softmax(0)
                out_D = a1 * x_D + a2 * module.value[n]
            y_TD[t] += weight * out_D
    return y_TD


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.integers(1, 5))
def test_written_out(zero, copy, constant, tokens):
    module = ZeroComputationExperts(6, zero, copy, constant)
    module.reset_parameters(std=1.0)
    x_TD, weights_TE = torch.randn(tokens, 6), torch.rand(tokens, module.num_experts)
    mask_TE = torch.rand(tokens, module.num_experts) < 0.5
    y_TD = module(x_TD, Assignment.from_mask(mask_TE, weights_TE))
    torch.testing.assert_close(y_TD, written_out(module, x_TD, weights_TE * mask_TE), atol=1e-5, rtol=1e-4)


def test_by_hand():
    module = ZeroComputationExperts(1, 1, 1, 1)
    module.value.data.fill_(5.0)
    module.blend.data.zero_()  # a_1 = a_2 = 1/2
    weights_TE = torch.tensor([[0.3, 0.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.5]])
    y_TD = module(torch.full((3, 1), 2.0), Assignment.from_mask(weights_TE > 0, weights_TE))
    torch.testing.assert_close(y_TD, torch.tensor([[0.0], [1.0], [0.5 * (1.0 + 2.5)]]))


def test_a_layer_adds_both_kinds_and_gradients_reach_all():
    torch.manual_seed(0)
    gate = LinearGate(8, 7)
    gate.reset_parameters(std=1.0)
    layer = MoE(
        Router(7, Softmax(), TopK(3), gate=gate),
        Experts(4, 8, 5),
        zero_computation=ZeroComputationExperts(8, 1, 1, 1),
    )
    layer.experts.reset_parameters(std=0.5)
    layer.zero_computation.reset_parameters(std=0.5)
    x_BSD = torch.randn(2, 16, 8)
    y_BSD, (routing,) = layer(x_BSD)
    weights_TE = routing.assignment.to_dense()
    feed_forward = Assignment.from_mask(routing.assignment.to_mask()[:, :4], weights_TE[:, :4])
    expected_TD = layer.experts(x_BSD.flatten(0, 1), feed_forward)
    expected_TD = expected_TD + written_out(layer.zero_computation, x_BSD.flatten(0, 1), weights_TE[:, 4:])
    torch.testing.assert_close(y_BSD.flatten(0, 1), expected_TD, atol=1e-5, rtol=1e-4)
    y_BSD.square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.any(), name
    assert gate.weight.grad.abs().sum(1).all()  # the zero expert too: softmax scores compete


@pytest.mark.parametrize(("first", "end"), [(0, 5), (0, 2), (2, 5), (3, 3), (5, 5)])
def test_a_part_of_an_assignment(first, end):
    mask_TE, weights_TE = torch.rand(6, 5) < 0.5, torch.rand(6, 5)
    part = Assignment.from_mask(mask_TE, weights_TE).of_experts(first, end)
    expected = Assignment.from_mask(mask_TE[:, first:end], weights_TE[:, first:end])
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1"):
        assert torch.equal(getattr(part, name), getattr(expected, name)), name
    assert part.num_tokens == 6
