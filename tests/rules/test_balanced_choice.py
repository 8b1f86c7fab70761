"""Sinkhorn and BASE: by hand, against an independent iteration and brute force, equal loads, and their twins."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.gates import LinearGate
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Sigmoid, Softmax
from crossways.rules.select import Base, Sinkhorn, TopK
from crossways.rules.select.base_layer import balanced_assignment


def reference_sinkhorn(logits_NE, tolerance=1e-4, limit=1000):
    """Rows to 1/N, columns to 1/E, in double precision and as the equations are written."""
    kernel_NE = logits_NE.double().exp()
    b_E = torch.ones(logits_NE.shape[1], dtype=torch.double)
    for _ in range(limit):
        a_N = 1 / (len(kernel_NE) * (kernel_NE * b_E).sum(1))
        new_E = 1 / (len(b_E) * (a_N[:, None] * kernel_NE).sum(0))
        change, b_E = (new_E - b_E).abs().mean(), new_E
        if change < tolerance:
            break
    return a_N[:, None] * kernel_NE * b_E


def test_sinkhorn_by_hand():
    # exp(W x) = ((4, 1), (9, 1)). Balanced columns of a 2 x 2 table leave one unknown: with odds ratio 4 / 9,
    # x^2 / (1/2 - x)^2 = 4 / 9, so x = 1/5 and the rows are (0.2, 0.3) and (0.3, 0.2).
    logits_BSE = torch.tensor([[[math.log(4), 0.0], [math.log(9), 0.0]]])
    rule = Sinkhorn(tolerance=1e-7)
    balanced_NE = rule.balance(logits_BSE, torch.ones(1, 2, dtype=torch.bool))[0]
    torch.testing.assert_close(balanced_NE / balanced_NE.sum(1, keepdim=True), torch.tensor([[0.4, 0.6], [0.6, 0.4]]))
    chosen = rule(logits_BSE, logits_BSE.sigmoid())
    assert list(zip(chosen.token_P.tolist(), chosen.expert_P.tolist(), strict=True)) == [(1, 0), (0, 1)]
    torch.testing.assert_close(chosen.weight_P, torch.tensor([0.9, 0.5]))  # raw scores: sigmoid(log 9), sigmoid(0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_against_an_independent_iteration(seed, k):
    logits_NE = 3 * torch.randn(24, 4, generator=torch.Generator().manual_seed(seed))
    expected_NE = reference_sinkhorn(logits_NE)
    logits_BSE, valid_BS = logits_NE[None], torch.ones(1, 24, dtype=torch.bool)
    balanced_NE = Sinkhorn().balance(logits_BSE, valid_BS)[0]
    torch.testing.assert_close(
        (balanced_NE / balanced_NE.sum(1, keepdim=True)).double(),
        expected_NE / expected_NE.sum(1, keepdim=True),
        atol=1e-5,
        rtol=1e-4,
    )
    mask_TE = Sinkhorn(k)(logits_BSE, logits_BSE.softmax(-1)).to_mask()
    expected_TE = torch.zeros_like(mask_TE).scatter(1, expected_NE.topk(k).indices, True)
    assert torch.equal(mask_TE, expected_TE)


def test_sinkhorn_balances_what_top_k_does_not():
    torch.manual_seed(0)
    logits_BSE = torch.randn(1, 64, 4) + torch.tensor([3.0, 0.0, 0.0, 0.0])
    plain, balanced = (rule(logits_BSE, logits_BSE).load_E() for rule in (TopK(1), Sinkhorn()))
    assert plain.max() > 48
    assert balanced.max() < 24


def test_sinkhorn_survives_extreme_logits():
    logits_BSE = torch.tensor([[[1e4, -1e4], [1e4, 1e4], [-1e30, 0.0]]])
    balanced_NE = Sinkhorn().balance(logits_BSE, torch.ones(1, 3, dtype=torch.bool))
    assert balanced_NE.isfinite().all()
    broken_BSE = logits_BSE.clone()
    broken_BSE[0, 1, 1] = math.nan
    mask_TE = Sinkhorn()(broken_BSE, broken_BSE.sigmoid()).to_mask()
    assert mask_TE[1].tolist() == [False, True]
    assert torch.equal(mask_TE.sum(1), torch.ones(3, dtype=torch.long))


def brute_force(gain_NE):
    """Best total over all balanced assignments."""
    tokens, experts = gain_NE.shape
    places = -(-tokens // experts)
    return max(
        sum(gain_NE[t, e].item() for t, e in enumerate(choice))
        for choice in itertools.product(range(experts), repeat=tokens)
        if max(choice.count(e) for e in range(experts)) <= places
    )


def test_base_by_hand():
    # both tokens prefer expert 0; token 1 loses less (5 -> 4) than token 0 (9 -> 1) by giving way
    logits_BSE = torch.tensor([[[9.0, 1.0], [5.0, 4.0]]])
    chosen = Base()(logits_BSE, logits_BSE.sigmoid())
    assert chosen.expert_P.tolist() == [0, 1]
    assert chosen.token_P.tolist() == [0, 1]
    torch.testing.assert_close(chosen.weight_P, torch.tensor([9.0, 4.0]).sigmoid())
    # 9 - 1 > 5 + 2, but sigmoid(9) + sigmoid(-1) < sigmoid(5) + sigmoid(2): scores would choose otherwise
    logits_BSE = torch.tensor([[[9.0, 5.0], [2.0, -1.0]]])
    assert Base()(logits_BSE, logits_BSE).to_mask()[:, 0].tolist() == [True, False]
    assert Base()(logits_BSE.sigmoid(), logits_BSE).to_mask()[:, 0].tolist() == [False, True]


@pytest.mark.parametrize("seed", range(6))
def test_base_is_the_optimum(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, experts = [(1, 3), (4, 2), (5, 2), (6, 3), (7, 3), (2, 4)][seed]
    gain_NE = torch.randn(tokens, experts, generator=generator).double()
    mask_NE = balanced_assignment(gain_NE)
    assert torch.equal(mask_NE.sum(1), torch.ones(tokens, dtype=torch.long))
    assert gain_NE[mask_NE].sum().item() == pytest.approx(brute_force(gain_NE), abs=1e-9)


def test_base_under_masks_that_cannot_be_balanced():
    gain_NE = torch.rand(4, 2).double()
    allowed_NE = torch.tensor([[True, False]] * 4)  # all must go to expert 0, which has two places
    mask_NE = balanced_assignment(gain_NE, allowed_NE)
    assert mask_NE.sum(0).tolist() == [2, 0]
    allowed_NE = torch.tensor([[False, True], [True, True], [True, True], [True, False]])
    mask_NE = balanced_assignment(torch.tensor([[-5.0, -9.0], [-5.0, -9.0], [-9.0, -5.0], [-9.0, -5.0]]), allowed_NE)
    assert not (mask_NE & ~allowed_NE).any()
    assert mask_NE.sum(1).tolist() == [1] * 4


def test_base_groups():
    torch.manual_seed(1)
    logits_BSE = torch.randn(2, 4, 4) + torch.tensor([[[4.0, 0, 0, 0]], [[0, 4.0, 0, 0]]])
    valid_BS = torch.tensor([[True] * 4, [True, True, False, False]])
    allowed_BSE = valid_BS[..., None].expand_as(logits_BSE)
    per_row_BSE = Base()(logits_BSE, logits_BSE, allowed_BSE).to_mask().view(2, 4, 4)
    assert per_row_BSE[0].sum(0).tolist() == [1, 1, 1, 1]
    assert per_row_BSE[1].sum(0).max() == 1
    whole_BSE = Base("batch")(logits_BSE, logits_BSE, allowed_BSE).to_mask().view(2, 4, 4)
    assert whole_BSE.sum((0, 1)).max() == 2
    assert whole_BSE[1, :2, 1].all()  # six tokens have eight places: row 1 may keep both


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.booleans(), st.sampled_from(["sequence", "batch"]))
def test_base_loads_are_equal(batch, sequence, experts, ties, group):
    logits_BSE = torch.zeros(batch, sequence, experts) if ties else torch.randn(batch, sequence, experts)
    valid_BS = torch.rand(batch, sequence) < 0.7
    allowed_BSE = valid_BS[..., None].expand_as(logits_BSE)
    mask_BSE = Base(group)(logits_BSE, logits_BSE, allowed_BSE).to_mask().view(batch, sequence, experts)
    assert torch.equal(mask_BSE.sum(-1), valid_BS.long())
    for tokens, load_E in (
        zip(valid_BS.sum(1).tolist(), mask_BSE.sum(1), strict=True)
        if group == "sequence"
        else [(int(valid_BS.sum()), mask_BSE.sum((0, 1)))]
    ):
        assert load_E.max() <= -(-tokens // experts)


@pytest.mark.parametrize("select", [Sinkhorn(), Sinkhorn(2, "batch"), Base(), Base("batch")], ids=str)
def test_the_router_chooses_by_logits_and_weighs_by_scores(select):
    torch.manual_seed(0)
    gate = LinearGate(8, 4)
    gate.reset_parameters(std=1.0)
    router = Router(4, Sigmoid() if select.k == 1 else Softmax(), select, gate=gate)
    x_BSD = torch.randn(2, 8, 8)
    routing = router(x_BSD)
    logits_BSE = gate(x_BSD)
    expected = select(logits_BSE, router.score(logits_BSE))
    torch.testing.assert_close(routing.assignment.to_dense(), expected.to_dense())
    causal = router(x_BSD, Context(causal=True)).assignment
    greedy = TopK(select.k)(logits_BSE, router.score(logits_BSE))
    torch.testing.assert_close(causal.to_dense(), greedy.to_dense())
    routing.assignment.weight_P.square().sum().backward()
    assert gate.weight.grad.abs().sum(1).all()


def test_in_a_router_base_solves_for_the_logits():
    gate = LinearGate(2, 2)
    gate.weight.data = torch.eye(2)
    routing = Router(2, Sigmoid(), Base(), gate=gate)(torch.tensor([[[9.0, 5.0], [2.0, -1.0]]]))
    assert routing.assignment.to_mask()[:, 0].tolist() == [True, False]  # scores would choose otherwise
