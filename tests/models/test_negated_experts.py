"""TC-MoE: experts that may also be subtracted, and zero experts that stand in for none."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.evaluation.cost import count_parameters, forward_flops_per_token
from crossways.experts import backends
from crossways.experts.compute import why_not
from crossways.experts.module import Experts
from crossways.experts.negated import signed
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.gates import LinearGate
from crossways.layers import MoE
from crossways.models import CrosswaysForCausalLM
from crossways.models.convert import to_qwen2_moe
from crossways.models.losses import auxiliary_losses
from crossways.router import Router
from crossways.routing import Routing
from crossways.rules.balance import over_experts, zero_reward
from crossways.rules.score import Softmax
from crossways.rules.select import TopK
from crossways.trace import traced

TERNARY = {
    "negated_experts": True,
    "negated_logit_offset": -1.0,
    "zero_experts": 2,
    "zero_logit_offset": -10.0,
    "renormalize": "with_zero",
}


def test_pairs_of_both_slots_by_hand():
    # Two experts: slots +0, +1, -0, -1. Token 0 adds both; token 1 subtracts 1; token 2 is in both slots of 0.
    weight_TS = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.7], [0.5, 0.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    pairs = signed(Assignment.from_mask(weight_TS > 0, weight_TS))
    torch.testing.assert_close(pairs.to_dense(), torch.tensor([[0.6, 0.4], [0.0, -0.7], [0.3, 0.0], [0.0, 0.0]]))
    assert pairs.load_E().tolist() == [2, 2]  # executed once, though chosen twice


def test_weights_that_cancel_are_still_executed():
    weight_TS = torch.tensor([[0.5, 0.5]])
    pairs = signed(Assignment.from_mask(weight_TS > 0, weight_TS))
    assert pairs.load_E().tolist() == [1]
    assert pairs.weight_P.tolist() == [0.0]


def test_the_router_of_tc_moe_by_hand():
    """Logits 0, -1 (+0, +1), 2, 0 (-0, -1), 1 and 12 (null): less 1 where subtracted and 10 where null."""
    gate = LinearGate(1, 6)
    gate.weight.data = torch.tensor([[0.0], [-1.0], [2.0], [0.0], [1.0], [12.0]])
    router = Router(
        6,
        Softmax(),
        TopK(2),
        gate=gate,
        renormalize="with_zero",
        zero_slots=(4, 6),
        logit_offsets=((2, 4, -1.0), (4, 6, -10.0)),
    )
    routing = router(torch.ones(1, 1, 1))
    exps = [math.exp(x) for x in (0.0, -1.0, 1.0, -1.0, -9.0, 2.0)]
    torch.testing.assert_close(routing.scores_TE, torch.tensor([exps]) / sum(exps))
    expected = [
        [0.0, 0.0, exps[2] / (exps[2] + exps[4] + exps[5]), 0.0, 0.0, exps[5] / (exps[2] + exps[4] + exps[5])]
    ]
    torch.testing.assert_close(routing.assignment.to_dense(), torch.tensor(expected))


def test_a_layer_subtracts_by_hand():
    """y = sum of weight * expert, minus where the slot says so, from each expert run alone."""
    torch.manual_seed(0)
    experts = Experts(3, 8, 4, backend="naive")
    experts.reset_parameters(std=0.5)
    x_TD = torch.randn(5, 8)
    alone_ETD = torch.stack(
        [experts(x_TD, Assignment.from_topk(torch.full((5, 1), e), torch.ones(5, 1), 3)) for e in range(3)]
    )
    gate = LinearGate(8, 7)
    gate.reset_parameters(std=1.0)
    router = Router(7, Softmax(), TopK(3), gate=gate)
    layer = MoE(router, experts, zero_computation=ZeroComputationExperts(8, zero=1), negated=True)
    y_BSD, (routing,) = layer(x_TD[None])
    dense_TS = routing.assignment.to_dense()
    sign_TE = dense_TS[:, :3] - dense_TS[:, 3:6]
    assert (sign_TE < 0).any()
    torch.testing.assert_close(y_BSD[0], torch.einsum("te,etd->td", sign_TE, alone_ETD))


@pytest.mark.parametrize("backend", [b for b in backends() if why_not(b, torch.device("cpu"), torch.float32) is None])
def test_every_backend_and_gradient(backend):
    torch.manual_seed(0)
    found = {}
    for name in ("naive", backend):
        torch.manual_seed(1)
        gate = LinearGate(16, 10)
        gate.reset_parameters(std=1.0)
        experts = Experts(4, 16, 8, backend=name)
        experts.reset_parameters(std=0.5)
        router = Router(10, Softmax(), TopK(5), gate=gate, renormalize="with_zero", zero_slots=(8, 10))
        layer = MoE(router, experts, zero_computation=ZeroComputationExperts(16, zero=2), negated=True)
        x_BSD = torch.randn(2, 20, 16, requires_grad=True)
        y_BSD, _ = layer(x_BSD)
        (y_BSD * torch.linspace(-1, 1, y_BSD.numel()).view_as(y_BSD)).sum().backward()
        found[name] = [y_BSD, x_BSD.grad, *(parameter.grad for parameter in layer.parameters() if parameter.numel())]
    for ours, reference in zip(found[backend], found["naive"], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    assert found[backend][2].abs().sum() > 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 5), experts=st.integers(1, 4), bounded=st.booleans())
def test_the_dense_formula_and_its_gradient(seed, tokens, experts, bounded):
    torch.manual_seed(seed)
    mask_TS = torch.rand(tokens, 2 * experts) < 0.6
    weight_TS = torch.rand(tokens, 2 * experts, dtype=torch.float64, requires_grad=True)
    build = Assignment.from_bounded_mask if bounded else Assignment.from_mask
    pairs = signed(build(mask_TS, weight_TS, int(mask_TS.sum()) + 2))
    either_TE = mask_TS[:, :experts] | mask_TS[:, experts:]
    assert torch.equal(pairs.to_mask(), either_TE)
    slope_TE = torch.randn(tokens, experts, dtype=torch.float64)
    chosen_TS = torch.where(mask_TS, weight_TS, 0.0)
    dense_TE = chosen_TS[:, :experts] - chosen_TS[:, experts:]
    torch.testing.assert_close(pairs.to_dense(), dense_TE)
    ours, theirs = (torch.autograd.grad((d * slope_TE).sum(), weight_TS)[0] for d in (pairs.to_dense(), dense_TE))
    torch.testing.assert_close(ours, theirs)


def test_the_balance_loss_by_hand(tiny_config):
    # Two experts, slots +0 +1 -0 -1 and one null. Loads 3, 1, 2, 0, 4: experts 5 and 1 of 6.
    load_S = torch.tensor([3.0, 1.0, 2.0, 0.0, 4.0])
    probs_TS = torch.tensor([[0.2, 0.1, 0.1, 0.1, 0.5], [0.4, 0.3, 0.1, 0.2, 0.0]])
    load_E, probs_TE = over_experts(load_S, probs_TS, 2, negated=True)
    assert load_E.tolist() == [5.0, 1.0]
    torch.testing.assert_close(probs_TE, torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    assert over_experts(load_S, probs_TS, 4, negated=False)[0].tolist() == [3.0, 1.0, 2.0, 0.0]

    config = tiny_config(
        num_experts=2, negated_experts=True, zero_experts=1, load_balance_over="experts", load_balance_coef=1.0
    )
    # One token each: chosen are +0 with -0, and null with +1. f = (2, 1) / 3.
    mask_TS = torch.tensor([[True, False, True, False, False], [False, True, False, False, True]])
    routing = Routing(probs_TS.clamp(min=1e-30).log(), probs_TS, Assignment.from_mask(mask_TS, probs_TS))
    losses, total = auxiliary_losses([routing], config)
    expected = 2 * (2 / 3 * 0.55 + 1 / 3 * 0.45)
    assert losses["load_balance"].item() == pytest.approx(expected)
    assert float(total) == pytest.approx(expected)


def test_the_reward_by_hand(tiny_config):
    probs_TS = torch.tensor([[0.2, 0.1, 0.1, 0.1, 0.5], [0.4, 0.3, 0.1, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert zero_reward(probs_TS, (4, 5)).item() == pytest.approx(-0.5)
    assert zero_reward(probs_TS, (4, 5), torch.tensor([True, True, False])).item() == pytest.approx(-0.25)
    assert zero_reward(probs_TS, (3, 4)).item() == pytest.approx(-0.1)
    scores_TS = (3 * probs_TS).requires_grad_()  # shares, whatever the scores sum to
    zero_reward(scores_TS, (4, 5)).backward()
    assert scores_TS.grad[0, 4] < 0 < scores_TS.grad[0, 0]


def test_the_reward_buys_zero_experts(tiny_config):
    ids_BS = torch.randint(1, 37, (4, 16))
    config = tiny_config(**(TERNARY | {"zero_logit_offset": 0.0}), zero_reward_coef=1.0)
    model = CrosswaysForCausalLM(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    share = []
    for _ in range(12):
        out = model(ids_BS, labels=ids_BS)
        share.append(-out.aux_losses["zero_reward"].mean().item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert share[-1] > share[0] + 0.1


def test_a_model_trains_saves_traces_and_generates(tiny_config, tmp_path, tokens):
    model = CrosswaysForCausalLM(tiny_config(**TERNARY, load_balance_coef=0.01, load_balance_over="experts")).train()
    ids_BS, mask_BS = tokens
    model(ids_BS, attention_mask=mask_BS, labels=ids_BS).loss.backward()
    assert all(gate.weight.grad.abs().sum() > 0 for gate in model.model.gates)
    model.save_pretrained(tmp_path)
    model.eval()
    loaded = CrosswaysForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids_BS).logits, model(ids_BS).logits)
    with traced(loaded) as trace:
        loaded(ids_BS, attention_mask=mask_BS)
    assert trace.load_RE.shape == (2, 10)  # 4 that add, 4 that subtract, 2 null
    assert (trace.load_RE.sum(1) == 2 * int(mask_BS.sum())).all()
    assert trace.load_RE[:, 4:8].sum() > 0
    assert loaded.generate(ids_BS[:1], max_new_tokens=2, do_sample=False).shape == (1, ids_BS.shape[1] + 2)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_config):
    ids_BS = torch.randint(1, 37, (3, 9))
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = CrosswaysForCausalLM(tiny_config(**TERNARY)).train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids_BS, labels=ids_BS).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for ours, reference in zip(*grads, strict=True):
        torch.testing.assert_close(ours, reference)


def test_negated_slots_share_the_weights_and_are_counted_as_executed(tiny_config):
    plain, negated = tiny_config(), tiny_config(negated_experts=True)
    slots = negated.num_experts * negated.hidden_size * len(negated.router_names)
    assert count_parameters(negated).total == count_parameters(plain).total + slots  # the gates' second rows
    assert count_parameters(negated).active == count_parameters(plain).active + slots
    gate_flops = 2 * slots
    assert forward_flops_per_token(negated, 8) == forward_flops_per_token(plain, 8) + gate_flops
    few = tiny_config(negated_experts=True, zero_experts=2)
    experts = 2 * 4 * 3 * 16 * 8  # layers, experts, matrices, widths
    assert count_parameters(few).active == count_parameters(few).total - experts + round(experts * 2 * 2 / 10)
    every = tiny_config(negated_experts=True, select={"name": "top_k", "k": 7})
    assert count_parameters(every).active == count_parameters(every).total


def test_what_does_not_fit_is_refused(tiny_config):
    for fields, message in (
        ({"negated_logit_offset": -1.0}, "set negated_experts"),
        ({"zero_logit_offset": -10.0}, "set zero_experts"),
        ({"zero_reward_coef": 0.1}, "set zero_experts"),
        ({"negated_experts": True, "negated_logit_offset": math.inf}, "finite"),
        ({"zero_experts": 1, "load_balance_over": "experts", "zero_computation_balance": 0.75}, "leave"),
        ({"load_balance_over": "groups"}, "load_balance_over must be one of"),
    ):
        with pytest.raises(UserError, match=message):
            tiny_config(**fields)
    with pytest.raises(UserError, match="may also be subtracted"):
        to_qwen2_moe(CrosswaysForCausalLM(tiny_config(negated_experts=True)))
