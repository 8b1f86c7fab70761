"""The routed layers: written out expert by expert, and the Cartesian layer against its parts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from crossways.experts.module import Experts
from crossways.gates import LinearGate
from crossways.layers import CartesianMoE, FeedForward, MoE, SharedExpert
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Softmax
from crossways.rules.select import TopC, TopK

WIDTH, EXPERTS = 8, 4


def moe(select=None, shared=0, activation="swiglu"):
    gate = LinearGate(WIDTH, EXPERTS)
    gate.reset_parameters(std=1.0)
    router = Router(EXPERTS, Softmax(), select or TopK(2), gate=gate)
    experts = Experts(EXPERTS, WIDTH, 5, activation)
    experts.reset_parameters(std=0.5)
    return MoE(router, experts, FeedForward(WIDTH, shared, activation) if shared else None)


def silu_expert(x_D, up_HD, down_DF):
    gate_F, up_F = (up_HD @ x_D).chunk(2)
    return down_DF @ (gate_F * gate_F.sigmoid() * up_F)


def test_moe_is_the_weighted_sum_of_its_experts():
    torch.manual_seed(0)
    layer, x_BSD = moe(shared=3), torch.randn(2, 3, WIDTH)
    y_BSD, (routing,) = layer(x_BSD)
    expected_TD = torch.zeros(6, WIDTH)
    for t, x_D in enumerate(x_BSD.flatten(0, 1)):
        probs_E = (layer.router.gate.weight @ x_D).softmax(-1)
        for e in probs_E.topk(2).indices:
            expert_D = silu_expert(x_D, layer.experts.gate_up_proj[e], layer.experts.down_proj[e])
            expected_TD[t] += probs_E[e] * expert_D
        shared = layer.shared_expert
        expected_TD[t] += silu_expert(x_D, shared.up_proj.weight, shared.down_proj.weight)
    torch.testing.assert_close(y_BSD.flatten(0, 1), expected_TD, atol=1e-6, rtol=1e-4)
    assert routing.assignment.num_pairs == 12


def test_a_token_that_chose_nobody_gets_nothing_but_the_shared_expert():
    torch.manual_seed(0)
    layer, x_BSD = moe(TopC(0.5), shared=3), torch.randn(1, 6, WIDTH)
    y_BSD, (routing,) = layer(x_BSD)
    nobody_T = routing.assignment.experts_per_token_T() == 0
    assert nobody_T.any()
    torch.testing.assert_close(y_BSD[0, nobody_T], layer.shared_expert(x_BSD)[0, nobody_T])


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "silu", "gelu", "relu"])
def test_feed_forward_of_every_activation(activation):
    layer, x_BSD = FeedForward(WIDTH, 5, activation), torch.randn(1, 2, WIDTH)
    function = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}.get(activation, activation)
    up_H = layer.up_proj(x_BSD)
    if activation.endswith("glu"):
        gate_F, up_F = up_H.chunk(2, -1)
        hidden_F = getattr(nn.functional, function)(gate_F) * up_F
    else:
        hidden_F = getattr(nn.functional, function)(up_H)
    torch.testing.assert_close(layer(x_BSD), layer.down_proj(hidden_F))


@pytest.mark.parametrize("skip", ["factor", "input"])
def test_one_factor_is_the_plain_layer(skip):
    plain = moe(shared=3)
    cartesian = CartesianMoE([copy.deepcopy(plain)], [], skip)
    x_BSD = torch.randn(2, 4, WIDTH)
    (ours_BSD, ours), (theirs_BSD, theirs) = cartesian(x_BSD, torch.randn(2, 4, WIDTH)), plain(x_BSD)
    assert torch.equal(ours_BSD, theirs_BSD)
    assert torch.equal(ours[0].assignment.to_dense(), theirs[0].assignment.to_dense())


@pytest.mark.parametrize("skip", ["factor", "input"])
def test_three_factors_written_out(skip):
    factors, norms = [moe() for _ in range(3)], [nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)]
    layer = CartesianMoE(factors, norms, skip)
    r_BSD = torch.randn(2, 3, WIDTH)
    x_BSD = nn.RMSNorm(WIDTH)(r_BSD)
    h1_BSD = r_BSD + factors[0](x_BSD)[0]
    h2_BSD = h1_BSD + factors[1](norms[0](h1_BSD))[0]
    last_BSD = factors[2](norms[1](h2_BSD))[0]
    h3_BSD = (r_BSD if skip == "input" else h2_BSD) + last_BSD
    added_BSD, routings = layer(x_BSD, r_BSD)
    torch.testing.assert_close(r_BSD + added_BSD, h3_BSD)
    assert len(routings) == 3
    assert layer.routers == tuple(factor.router for factor in factors)


def test_each_factor_reads_what_the_previous_one_wrote():
    layer = CartesianMoE([moe(), moe()], [nn.Identity()])
    r_BSD = torch.randn(1, 2, WIDTH)
    x_BSD = torch.randn(1, 2, WIDTH)
    _, routings = layer(x_BSD, r_BSD)
    read_BSD = r_BSD + layer.factors[0](x_BSD)[0]
    torch.testing.assert_close(routings[1].logits_TE, layer.factors[1].router.gate(read_BSD).flatten(0, 1))


def test_gates_given_at_the_call_go_to_their_factor():
    layer = CartesianMoE([moe(), moe()], [nn.Identity()])
    gates = [LinearGate(WIDTH, EXPERTS) for _ in range(2)]
    contexts = [Context(gate=gate) for gate in gates]
    x_BSD = torch.randn(1, 2, WIDTH)
    _, routings = layer(x_BSD, x_BSD, contexts)
    torch.testing.assert_close(routings[0].logits_TE, gates[0](x_BSD).flatten(0, 1))
    read_BSD = x_BSD + layer.factors[0](x_BSD, contexts=contexts[:1])[0]
    torch.testing.assert_close(routings[1].logits_TE, gates[1](read_BSD).flatten(0, 1))


def test_factors_need_norms_between_them():
    with pytest.raises(ValueError, match="2 factors need 1 norms"):
        CartesianMoE([moe(), moe()], [])


@pytest.mark.parametrize("skip", ["factor", "input"])
def test_stacked_routers_may_all_read_the_layers_input(skip):
    factors, norms = [moe() for _ in range(3)], [nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)]
    layer = CartesianMoE(factors, norms, skip, router_input="layer")
    r_BSD = torch.randn(2, 3, WIDTH)
    x_BSD = nn.RMSNorm(WIDTH)(r_BSD)
    added_BSD, routings = layer(x_BSD, r_BSD)
    for factor, routing in zip(factors, routings, strict=True):
        assert torch.equal(routing.logits_TE, factor.router.gate(x_BSD).flatten(0, 1))
    # the experts still run in sequence
    h1_BSD = r_BSD + factors[0](x_BSD)[0]
    y2_TD = factors[1].experts(norms[0](h1_BSD).flatten(0, 1), routings[1].assignment)
    h2_BSD = h1_BSD + y2_TD.view_as(r_BSD)
    y3_TD = factors[2].experts(norms[1](h2_BSD).flatten(0, 1), routings[2].assignment)
    last_BSD = (r_BSD if skip == "input" else h2_BSD) + y3_TD.view_as(r_BSD)
    torch.testing.assert_close(r_BSD + added_BSD, last_BSD)


def test_a_shared_expert_may_be_scaled_and_gated():
    x_BSD = torch.randn(1, 3, WIDTH)
    plain = FeedForward(WIDTH, 5)
    shared = SharedExpert(WIDTH, 5, scale=0.5, gated=True)
    shared.load_state_dict(plain.state_dict() | {"gate.weight": torch.full((1, WIDTH), 0.3)})
    factor_BS1 = 1 / (1 + (-0.3 * x_BSD.sum(-1, keepdim=True)).exp())
    torch.testing.assert_close(shared(x_BSD), 0.5 * factor_BS1 * plain(x_BSD))
    same = SharedExpert(WIDTH, 5)
    same.load_state_dict(plain.state_dict())  # neither: no parameter more
    assert torch.equal(same(x_BSD), plain(x_BSD))
