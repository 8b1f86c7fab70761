"""The router: gate, score and selection together, and the running cutoff of the decode twin."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from crossways.errors import UserError
from crossways.gates import LinearGate
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Sigmoid, Softmax
from crossways.rules.select import ExpertChoice, Threshold, TopC, TopK


def router_of(select, *, experts=4, width=8, **kwargs):
    torch.manual_seed(0)
    gate = LinearGate(width, experts)
    gate.reset_parameters(std=1.0)
    return Router(experts, kwargs.pop("score", Softmax()), select, gate=gate, **kwargs)


def test_a_routing_holds_raw_logits_scores_and_what_is_executed():
    router = router_of(TopK(2))
    x_BSD = torch.randn(2, 3, 8)
    routing = router(x_BSD)
    torch.testing.assert_close(routing.logits_TE, (x_BSD @ router.gate.weight.t()).flatten(0, 1))
    torch.testing.assert_close(routing.scores_TE, routing.logits_TE.softmax(-1))
    top_TK = routing.scores_TE.topk(2).values.sort().values
    dense_TK = routing.assignment.to_dense().topk(2).values.sort().values
    torch.testing.assert_close(dense_TK, top_TK)
    assert routing.valid_T is None


def test_padding_chooses_nobody_and_changes_nobody():
    valid_BS = torch.tensor([[True, True, False], [True, False, False]])
    x_BSD = torch.randn(2, 3, 8)
    edited_BSD = torch.where(valid_BS[..., None], x_BSD, 50.0)
    for select in (TopK(2), TopC(1.5, "batch"), ExpertChoice(2.0, "batch"), Threshold(value=0.2)):
        router = router_of(select)
        routing, edited = router(x_BSD, Context(valid_BS=valid_BS)), router(edited_BSD, Context(valid_BS=valid_BS))
        assert not routing.assignment.to_mask()[~valid_BS.flatten()].any()
        assert torch.equal(routing.assignment.to_dense(), edited.assignment.to_dense())
        assert torch.equal(routing.valid_T, valid_BS.flatten())


def test_the_cutoff_does_not_see_padding():
    router = router_of(TopC(1.0)).train()
    valid_BS = torch.tensor([[True, True, False]])
    x_BSD = torch.randn(1, 3, 8)
    padded, alone = router(x_BSD, Context(valid_BS=valid_BS)), router(x_BSD[:, :2])
    assert torch.equal(padded.cutoff_C, alone.cutoff_C)


def test_renormalised_weights_sum_to_one():
    routing = router_of(TopC(1.5), renormalize=True)(torch.randn(2, 6, 8))
    sums_T = routing.assignment.weight_sum_T()
    chose_T = routing.assignment.experts_per_token_T() > 0
    torch.testing.assert_close(sums_T[chose_T], torch.ones_like(sums_T[chose_T]))
    assert not sums_T[~chose_T].any()


def test_a_gate_given_at_the_call_is_used():
    router = Router(4, Softmax(), TopK(1))
    gate = LinearGate(8, 4)
    x_BSD = torch.randn(1, 2, 8)
    assert torch.equal(router(x_BSD, Context(gate=gate)).logits_TE, gate(x_BSD).flatten(0, 1))
    assert not list(router.parameters())
    with pytest.raises(ValueError, match="owns no gate"):
        router(x_BSD)


def test_impossible_budgets_are_refused_at_construction():
    with pytest.raises(UserError, match="k = 5"):
        Router(4, Softmax(), TopK(5))


def test_the_running_cutoff_by_hand():
    router = router_of(TopC(1.0), cutoff_momentum=0.9).train()
    first, second = router(torch.randn(1, 5, 8)), router(torch.randn(1, 5, 8))
    router.observe(first)
    assert torch.equal(router.cutoff, first.cutoff_C)
    router.observe(second)
    torch.testing.assert_close(router.cutoff, 0.9 * first.cutoff_C + 0.1 * second.cutoff_C)
    # five tokens and k = 1: the fifth greatest score
    assert first.cutoff_C.item() == first.scores_TE.flatten().sort(descending=True).values[4]


def test_the_decode_twin_uses_the_cutoff_and_is_calibrated_by_expert():
    for select, width in ((TopC(1.0), 1), (ExpertChoice(1.0), 4)):
        router = router_of(select).train()
        router.observe(router(torch.randn(1, 64, 8)))
        assert router.cutoff.shape == (width,)
        causal = router.eval()(torch.randn(2, 3, 8), Context(causal=True))
        assert torch.equal(causal.assignment.to_mask(), causal.scores_TE >= router.cutoff)


def test_an_uncalibrated_twin_says_what_to_do():
    router = router_of(TopC(1.0)).eval()
    router(torch.randn(1, 2, 8))
    with pytest.raises(UserError, match="train the model for a step or calibrate"):
        router(torch.randn(1, 2, 8), Context(causal=True))


def test_a_threshold_learns_from_its_first_batch():
    router = router_of(Threshold(k=1.0)).train()
    first = router(torch.randn(1, 6, 8))
    assert first.assignment.num_pairs == 6
    router.observe(first)
    assert router.eval()(torch.randn(1, 2, 8)).cutoff_C is None


def test_no_cutoff_where_none_is_needed():
    for select in (TopK(1), Threshold(value=0.3)):
        router = router_of(select)
        assert "cutoff" not in router.state_dict()
        assert router.train()(torch.randn(1, 2, 8)).cutoff_C is None


def test_batches_without_a_cutoff_leave_the_estimate():
    router = router_of(TopC(1.0)).train()
    x_BSD = torch.randn(1, 4, 8)
    router.observe(router(x_BSD))
    before_C = router.cutoff.clone()
    router.observe(router(x_BSD, Context(valid_BS=torch.zeros(1, 4, dtype=torch.bool))))
    router.observe(router(torch.full((1, 4, 8), math.nan)))
    assert torch.equal(router.cutoff, before_C)


def test_a_given_cutoff_replaces_the_running_one():
    router = router_of(Threshold(k=1.0)).train()
    x_BSD = torch.randn(1, 6, 8)
    router.observe(router(x_BSD))
    kept_C = router.cutoff.clone()
    before = router(x_BSD, Context(cutoff_C=kept_C))
    router.cutoff.fill_(0.99)
    assert torch.equal(router(x_BSD, Context(cutoff_C=kept_C)).assignment.to_mask(), before.assignment.to_mask())
    assert router(x_BSD).assignment.num_pairs < before.assignment.num_pairs


def test_the_cutoff_stays_float32_and_exact():
    router = router_of(TopC(1.0)).train()
    router.observe(router(torch.randn(1, 9, 8)))
    exact_C = router.cutoff.clone()
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        other = convert(copy.deepcopy(router))
        assert other.gate.weight.dtype != torch.float32
        assert other.cutoff.dtype == torch.float32
        assert torch.equal(other.cutoff, exact_C)
        assert other.state_dict()["cutoff"].dtype == torch.float32
    assert copy.deepcopy(router).to("meta").cutoff.is_meta


def test_perturbations_receive_the_decision_and_may_replace_it():
    router = router_of(TopK(1), score=Sigmoid())
    x_BSD = torch.randn(1, 5, 8)
    usual = router(x_BSD).assignment.top_expert_T()

    def without_the_best(logits_BSE, allowed_BSE, decide):
        best_BSE = torch.nn.functional.one_hot(logits_BSE.argmax(-1), 4).bool()
        return decide(logits_BSE, ~best_BSE if allowed_BSE is None else allowed_BSE & ~best_BSE)

    router.perturbation = without_the_best
    routing = router(x_BSD)
    assert not (routing.assignment.top_expert_T() == usual).any()
    second_T = routing.logits_TE.topk(2).indices[:, 1]
    assert torch.equal(routing.assignment.top_expert_T(), second_T)


class Reading(torch.nn.Module):
    """Keeps what it was given to read."""

    def forward(self, x_BSD, context=None):
        self.read_BSD = x_BSD
        return x_BSD.float()


def test_jitter_multiplies_what_the_gate_reads_in_training_alone():
    gate = Reading()
    router = Router(4, Softmax(), TopK(1), gate=gate, input_jitter=0.1)
    x_BSD = 2.0 * torch.ones(8, 50, 4)
    router.eval()(x_BSD)
    assert torch.equal(gate.read_BSD, x_BSD)
    torch.manual_seed(0)
    router.train()(x_BSD)
    factor_BSD = gate.read_BSD / x_BSD
    assert factor_BSD.min() >= 0.9
    assert factor_BSD.max() <= 1.1
    assert factor_BSD.mean().item() == pytest.approx(1.0, abs=0.01)
    assert factor_BSD.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.05)  # uniform, each number by itself
    assert factor_BSD.unique().numel() > 1000
    router(x_BSD.bfloat16())
    assert (gate.read_BSD / 2).unique().numel() > 1000  # not the few values that bfloat16 has there
    router.input_jitter = 0.0
    router(x_BSD)
    assert torch.equal(gate.read_BSD, x_BSD)


def test_jitter_leaves_the_experts_input_alone_and_passes_gradients():
    router = Router(4, Softmax(), TopK(1), gate=Reading(), input_jitter=0.5).train()
    x_BSD = torch.randn(1, 3, 4, requires_grad=True)
    before_BSD = x_BSD.detach().clone()
    router(x_BSD).scores_TE.square().sum().backward()
    assert torch.equal(x_BSD, before_BSD)
    assert x_BSD.grad.any()


def test_dropout_of_the_routers_input_in_training_alone():
    gate = Reading()
    router, x_BSD = Router(4, Softmax(), TopK(1), gate=gate, input_dropout=0.25), torch.ones(8, 50, 4)
    router.eval()(x_BSD)
    assert torch.equal(gate.read_BSD, x_BSD)
    torch.manual_seed(0)
    router.train()(x_BSD)
    assert gate.read_BSD.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert (gate.read_BSD == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
