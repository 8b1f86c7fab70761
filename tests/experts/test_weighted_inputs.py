"""Weights on the input: numbers by hand, the formula with its gradients, transformers' Llama 4."""

from __future__ import annotations

import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts import Activation, Experts, backends, why_not
from crossways.experts.weighted_inputs import on_weighted_inputs
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.gates import LinearGate
from crossways.layers import MoE
from crossways.router import Router
from crossways.rules.score import Sigmoid, Softmax
from crossways.rules.select import TopK

CPU = torch.device("cpu")


def random_mask(tokens, experts):
    mask_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(0)) < 0.5
    mask_TE[:, 1] = False
    mask_TE[:1] = False
    return mask_TE


MASKS = {
    "ragged": random_mask(19, 5),
    "one-token": torch.tensor([[True, False, True]]),
    "nobody": torch.zeros(4, 3, dtype=torch.bool),
    "no-tokens": torch.zeros(0, 3, dtype=torch.bool),
}


def test_numbers_by_hand():
    # E(z) = 3 relu(2 z)^1: with a weight of 0.5 on x = 4, 3 * relu(2 * 0.5 * 4) = 12; a ReLU expert cannot tell where
    # a positive weight stands, a SiLU one can: 3 silu(4) = 12 / (1 + e^-4), not 0.5 * 3 silu(8).
    assignment = Assignment.from_topk(torch.tensor([[0]]), torch.tensor([[0.5]]), 1)
    x_TD = torch.tensor([[4.0]])
    for activation, expected in (("relu", 12.0), ("silu", 12.0 / (1 + torch.tensor(-4.0).exp().item()))):
        experts = Experts(1, 1, 1, activation)
        torch.nn.init.constant_(experts.up_proj, 2.0)
        torch.nn.init.constant_(experts.down_proj, 3.0)
        assert on_weighted_inputs(experts, x_TD, assignment).item() == pytest.approx(expected)
    assert experts(x_TD, assignment).item() == pytest.approx(12.0 / (1 + torch.tensor(-8.0).exp().item()))


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("backend", ["naive", "loop", "fused", "grouped_mm", "transformers:batched_mm"])
def test_every_backend_is_the_formula_with_every_gradient(case, backend):
    dtype = torch.float32
    assert backend in backends()
    if reason := why_not(backend, CPU, dtype):
        pytest.skip(reason)
    mask_TE, act = MASKS[case], Activation("swiglu")
    tokens, num_experts = mask_TE.shape
    experts = Experts(num_experts, 8, 12, backend=backend, bias=True)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    x_TD = torch.randn(tokens, 8, generator=generator).requires_grad_()
    weight_P = torch.randn(int(mask_TE.sum()), generator=generator).requires_grad_()
    leaves = [x_TD, weight_P, *experts.parameters()]

    def gradients(y_TD):
        grad_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(2))
        return [y_TD, *torch.autograd.grad(y_TD, leaves, grad_TD, allow_unused=True)]

    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(weight_P)
    matrix_TE = assignment.to_dense()
    rows = []
    for t in range(tokens):
        row_D = x_TD[t] * 0
        for e in range(num_experts):
            if mask_TE[t, e]:
                up_H = experts.gate_up_proj[e] @ (matrix_TE[t, e] * x_TD[t]) + experts.gate_up_proj_bias[e]
                row_D = row_D + experts.down_proj[e] @ act(up_H[None])[0] + experts.down_proj_bias[e]
        rows.append(row_D)
    expected = gradients(torch.stack(rows) if rows else x_TD * 1)
    for ours, theirs in zip(gradients(on_weighted_inputs(experts, x_TD, assignment)), expected, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("k", [1, 2])
def test_it_is_llama_4(k):
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4TextMoe

    config = Llama4TextConfig(
        hidden_size=8, intermediate_size=6, num_local_experts=4, num_experts_per_tok=k, hidden_act="silu"
    )
    theirs = Llama4TextMoe(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    shared = theirs.shared_expert
    router = Router(4, Sigmoid(), TopK(k), gate=LinearGate(8, 4))
    ours = MoE(router, Experts(4, 8, 6), shared, weights_on="input")
    with torch.no_grad():
        router.gate.weight.copy_(theirs.router.weight)
        ours.experts.gate_up_proj.copy_(theirs.experts.gate_up_proj.mT)
        ours.experts.down_proj.copy_(theirs.experts.down_proj.mT)
    x_BSD = torch.randn(2, 5, 8)
    expected_BSD, _ = theirs(x_BSD)
    torch.testing.assert_close(ours(x_BSD)[0], expected_BSD.view_as(x_BSD), atol=1e-5, rtol=1e-4)


def test_the_router_learns_through_the_input_of_every_kind_of_expert():
    router = Router(5, Softmax(), TopK(2), gate=LinearGate(8, 5))
    layer = MoE(router, Experts(3, 8, 6), None, ZeroComputationExperts(8, 0, 1, 1), weights_on="input")
    layer.zero_computation.reset_parameters(1.0)
    router.gate.reset_parameters(1.0)
    x_BSD = torch.randn(2, 9, 8, requires_grad=True)
    y_BSD, (routing,) = layer(x_BSD)
    assert set(routing.assignment.expert_P.tolist()) == set(range(5))
    expected_TD, x_TD = torch.zeros(18, 8), x_BSD.flatten(0, 1)
    matrix_TE = routing.assignment.to_dense()
    for e in range(5):
        alone = Assignment.from_topk(torch.full((18, 1), e if e < 3 else e - 3), torch.ones(18, 1), 3 if e < 3 else 2)
        read_TD = matrix_TE[:, e : e + 1] * x_TD
        out_TD = (layer.experts if e < 3 else layer.zero_computation)(read_TD, alone)
        expected_TD = expected_TD + out_TD.where(routing.assignment.to_mask()[:, e : e + 1], 0.0)
    torch.testing.assert_close(y_BSD.flatten(0, 1), expected_TD)
    wrt = [router.gate.weight, x_BSD]
    for ours, theirs in zip(
        torch.autograd.grad(y_BSD.square().sum(), wrt, retain_graph=True),
        torch.autograd.grad(expected_TD.square().sum(), wrt),
        strict=True,
    ):
        assert ours.abs().sum() > 0
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_slack_and_low_precision():
    mask_TE = MASKS["ragged"]
    slack = Assignment.from_bounded_mask(mask_TE, torch.rand(mask_TE.shape), most=int(mask_TE.sum()) + 7)
    experts = Experts(5, 8, 16, backend="grouped_mm")
    experts.reset_parameters(0.5)
    x_TD = torch.randn(19, 8)
    expected_TD = on_weighted_inputs(experts, x_TD, slack.compact())
    torch.testing.assert_close(on_weighted_inputs(experts, x_TD, slack), expected_TD)
    low_TD = on_weighted_inputs(experts.bfloat16(), x_TD.bfloat16(), slack)
    assert low_TD.dtype == torch.bfloat16
    assert (low_TD.float() - expected_TD).norm() < 3e-2 * expected_TD.norm()
