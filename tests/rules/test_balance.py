"""Balancing losses: by hand, against transformers, and without padding."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from crossways.assignment import Assignment
from crossways.rules.balance import (
    entropy_loss,
    importance_loss,
    load_balance_loss,
    mutual_information_loss,
    router_z_loss,
    sequence_balance_loss,
    sequence_entropy_loss,
    sparsity_loss,
)
from crossways.rules.select import TopC, TopK


def test_load_balance_by_hand():
    # Two tokens, two experts; probabilities (3/4, 1/4) and (1/4, 3/4), so P = (1/2, 1/2); f = (2/3, 1/3).
    logits_TE = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    mask_TE = torch.tensor([[True, True], [True, False]])
    loss = load_balance_loss(logits_TE, Assignment.from_mask(mask_TE, torch.ones(2, 2)))
    assert loss.item() == pytest.approx(2 * (2 / 3 * 1 / 2 + 1 / 3 * 1 / 2))
    # Both tokens (3/4, 1/4) and both on expert 0: 2 * 1 * 3/4.
    logits_TE = torch.tensor([[math.log(3), 0.0]] * 2)
    collapsed = Assignment.from_topk(torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1), 2)
    assert load_balance_loss(logits_TE, collapsed).item() == pytest.approx(1.5)


def test_z_loss_by_hand():
    # logsumexp of (0, 0) is log 2, of (log 3, 0) is log 4
    logits_TE = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert router_z_loss(logits_TE).item() == pytest.approx((math.log(2) ** 2 + math.log(4) ** 2) / 2)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_transformers_loss_is_k_times_ours(k):
    logits_TE = torch.randn(12, 5)
    scores_BSE = logits_TE.softmax(-1)[None]
    ours = load_balance_loss(logits_TE, TopK(k)(scores_BSE, scores_BSE))
    theirs = load_balancing_loss_func((logits_TE,), num_experts=5, top_k=k)
    torch.testing.assert_close(k * ours, theirs)


def test_transformers_loss_with_padding():
    logits_TE = torch.randn(12, 5)
    mask_BS = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]])
    scores_BSE = logits_TE.softmax(-1).view(2, 6, 5)
    allowed_BSE = mask_BS.bool()[..., None].expand(2, 6, 5)
    ours = load_balance_loss(logits_TE, TopK(2)(scores_BSE, scores_BSE, allowed_BSE), mask_BS.flatten().bool())
    theirs = load_balancing_loss_func((logits_TE,), num_experts=5, top_k=2, attention_mask=mask_BS)
    torch.testing.assert_close(2 * ours, theirs)


def test_perfect_balance_is_one_for_any_budget():
    for k in (1, 2.5, 4):
        scores_BSE = torch.full((1, 8, 4), 0.25)
        uniform = TopC(k)(scores_BSE, scores_BSE)
        assert load_balance_loss(torch.zeros(8, 4), uniform).item() == pytest.approx(1.0)


def test_padding_content_changes_nothing_and_gets_no_gradient():
    logits_TE = torch.randn(6, 3, requires_grad=True)
    valid_T = torch.tensor([True, True, False, True, False, True])
    scores_BSE = logits_TE.detach().softmax(-1)[None]
    assignment = TopK(1)(scores_BSE, scores_BSE, valid_T[None, :, None].expand(1, 6, 3))
    for loss in (load_balance_loss(logits_TE, assignment, valid_T), router_z_loss(logits_TE, valid_T)):
        logits_TE.grad = None
        loss.backward(retain_graph=True)
        assert not logits_TE.grad[~valid_T].any()
        assert logits_TE.grad[valid_T].any()
    edited_TE = torch.where(valid_T[:, None], logits_TE, 100.0)
    torch.testing.assert_close(router_z_loss(edited_TE, valid_T), router_z_loss(logits_TE[valid_T]))
    torch.testing.assert_close(
        load_balance_loss(edited_TE, assignment, valid_T), load_balance_loss(logits_TE, assignment, valid_T)
    )


def test_nothing_but_padding_costs_nothing():
    logits_TE = torch.randn(3, 2, requires_grad=True)
    nobody = Assignment.from_mask(torch.zeros(3, 2, dtype=torch.bool), torch.zeros(3, 2))
    none_T = torch.zeros(3, dtype=torch.bool)
    total = load_balance_loss(logits_TE, nobody, none_T) + router_z_loss(logits_TE, none_T)
    total.backward()
    assert total == 0
    assert not logits_TE.grad.any()


def test_losses_are_float32_on_raw_logits():
    logits_TE = torch.randn(4, 3, dtype=torch.bfloat16)
    scores_BSE = logits_TE.float().softmax(-1)[None]
    assert load_balance_loss(logits_TE, TopK(1)(scores_BSE, scores_BSE)).dtype == torch.float32
    assert router_z_loss(logits_TE).dtype == torch.float32
    shifted = router_z_loss(logits_TE.float() + 3.0)  # a loss on scores would not see the shift
    assert shifted > router_z_loss(logits_TE.float())


def assignment_of(weights_TE):
    weights_TE = torch.tensor(weights_TE)
    return Assignment.from_mask(weights_TE > 0, weights_TE)


def test_weighted_load_balance_by_hand():
    # P = (1/2, 1/2), f = (2/3, 1/3); the second expert's term counts 0.75
    logits_TE = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    chosen = assignment_of([[1.0, 1.0], [1.0, 0.0]])
    loss = load_balance_loss(logits_TE, chosen, share_E=torch.tensor([1.0, 0.75]))
    assert loss.item() == pytest.approx(2 * (1 / 3 + 0.75 / 6))


def test_sequence_balance_by_hand():
    # Row 1: scores (0.6, 0.2) and (0.1, 0.3) scaled to (3/4, 1/4) and (1/4, 3/4): P = (1/2, 1/2), both on expert 0.
    # Row 2: (1, 0) scaled, one padding token: P = (1, 0), f = (1, 0), loss 2.
    scores_TE = torch.tensor([[0.6, 0.2], [0.1, 0.3], [0.5, 0.0], [9.0, 9.0]])
    chosen = assignment_of([[0.6, 0.0], [0.1, 0.0], [0.5, 0.0], [0.0, 0.0]])
    valid_T = torch.tensor([True, True, True, False])
    loss = sequence_balance_loss(scores_TE, chosen, 2, valid_T)
    assert loss.item() == pytest.approx((2 * 1 / 2 + 2 * 1) / 2)


def test_the_sequence_loss_is_deepseek_v2s_expert_level_loss():
    # Eq. 23-25 with N_r = 3, K_r = 2, T = 2 in each of two sequences: f = 3 n / 4, softmax scores used as they are.
    # Sequence 1: n = (2, 1, 1), P = (0.5, 0.3, 0.2): 1.5 * 0.5 + 0.75 * 0.5 = 1.125.
    # Sequence 2: n = (0, 2, 2), P = (0.15, 0.4, 0.45): 1.5 * 0.85 = 1.275.
    scores_TE = torch.tensor([[0.6, 0.3, 0.1], [0.4, 0.3, 0.3], [0.2, 0.4, 0.4], [0.1, 0.4, 0.5]])
    chosen = assignment_of([[0.6, 0.3, 0.0], [0.4, 0.0, 0.3], [0.0, 0.4, 0.4], [0.0, 0.4, 0.5]])
    assert sequence_balance_loss(scores_TE, chosen, 2).item() == pytest.approx((1.125 + 1.275) / 2)


def test_sequence_balance_sees_what_the_batch_hides():
    scores_TE = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    chosen = assignment_of([[1.0, 0.0], [0.0, 1.0]])
    assert sequence_balance_loss(scores_TE, chosen, 1).item() == pytest.approx(1.0)
    assert sequence_balance_loss(scores_TE, chosen, 2).item() == pytest.approx(2.0)


def test_importance_by_hand():
    # importance (3, 1), mean 2, variance 1: CV^2 = 1/4
    assert importance_loss(assignment_of([[1.0, 0.0], [2.0, 1.0]])).item() == pytest.approx(0.25)
    assert importance_loss(assignment_of([[0.5, 0.5]])).item() == 0
    assert importance_loss(assignment_of([[2.0, 0.0, 0.0, 0.0]])).item() == pytest.approx(3.0)


def test_entropy_by_hand():
    # mean of (3/4, 1/4) and (1/4, 3/4) is even: -log 2; alone, (3/4, 1/4)
    logits_TE = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    assert entropy_loss(logits_TE).item() == pytest.approx(-math.log(2))
    alone = entropy_loss(logits_TE, torch.tensor([True, False])).item()
    assert alone == pytest.approx(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert entropy_loss(torch.tensor([[1e4, 0.0]])).item() == pytest.approx(0.0, abs=1e-6)


def test_sparsity_by_hand():
    # k = 1, T = 2, E = 2: f = E load / (k T) = (2, 1); means (1.5, 0.5): 2 * 1.5 + 0.5
    scores_TE = torch.tensor([[1.0, 0.0], [2.0, 1.0]])
    assert sparsity_loss(scores_TE, assignment_of(scores_TE.tolist()), 1.0).item() == pytest.approx(3.5)
    # perfect balance at the budget: f = 1, so the plain L1 norm per token
    scores_TE = torch.tensor([[0.4, 0.0], [0.0, 0.7]])
    assert sparsity_loss(scores_TE, assignment_of(scores_TE.tolist()), 1.0).item() == pytest.approx(1.1 / 2)
    padded = sparsity_loss(
        torch.cat([scores_TE, torch.ones(1, 2)]),
        assignment_of([[0.4, 0.0], [0.0, 0.7], [0.0, 0.0]]),
        1.0,
        torch.tensor([True, True, False]),
    )
    assert padded.item() == pytest.approx(1.1 / 2)


@pytest.mark.parametrize("padding", [False, True])
def test_gradients_of_every_loss_are_finite_and_spare_padding(padding):
    torch.manual_seed(0)
    logits_TE = torch.randn(6, 3, requires_grad=True)
    valid_T = torch.tensor([True, True, False, True, False, False]) if padding else None
    scores_TE = logits_TE.relu() if not padding else logits_TE.sigmoid()
    allowed_BSE = None if valid_T is None else valid_T[None, :, None].expand(1, 6, 3)
    chosen = TopK(2)(scores_TE[None], scores_TE[None], allowed_BSE)
    losses = (
        sequence_balance_loss(scores_TE, chosen, 2, valid_T),
        importance_loss(chosen),
        entropy_loss(logits_TE, valid_T),
        sparsity_loss(scores_TE, chosen, 1.0, valid_T),
    )
    for loss in losses:
        logits_TE.grad = None
        loss.backward(retain_graph=True)
        assert loss.dtype == torch.float32
        assert logits_TE.grad.isfinite().all()
        assert logits_TE.grad.any()
        if padding:
            assert not logits_TE.grad[~valid_T].any()


def test_nothing_but_padding_costs_nothing_under_any_loss():
    scores_TE = torch.rand(4, 2, requires_grad=True)
    nobody = Assignment.from_mask(torch.zeros(4, 2, dtype=torch.bool), scores_TE)
    none_T = torch.zeros(4, dtype=torch.bool)
    total = (
        sequence_balance_loss(scores_TE, nobody, 2, none_T)
        + importance_loss(nobody)
        + entropy_loss(scores_TE, none_T)
        + sparsity_loss(scores_TE, nobody, 1.0, none_T)
    )
    total.backward()
    assert total == 0
    assert not scores_TE.grad.any()


def test_load_balance_at_a_temperature_by_hand():
    # probabilities at temperature 1/2 are (9/10, 1/10) where they are (3/4, 1/4) at 1; all tokens on expert 0
    logits_TE = torch.tensor([[math.log(3), 0.0]] * 2)
    collapsed = assignment_of([[1.0, 0.0], [1.0, 0.0]])
    assert load_balance_loss(logits_TE, collapsed, temperature=0.5).item() == pytest.approx(2 * 0.9)


EVEN, SURE = math.log(2), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)
"""Entropies of (1/2, 1/2) and of (3/4, 1/4)."""


def test_entropy_of_each_sequence_by_hand():
    # (3/4, 1/4), (1/4, 3/4) in the first row: even; (3/4, 1/4) and padding in the second; the batch as a whole is not
    logits_TE = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)], [math.log(3), 0.0], [0.0, 50.0]])
    valid_T = torch.tensor([True, True, True, False])
    assert sequence_entropy_loss(logits_TE, 2, valid_T).item() == pytest.approx(-(EVEN + SURE) / 2)
    torch.testing.assert_close(sequence_entropy_loss(logits_TE, 1, valid_T), entropy_loss(logits_TE, valid_T))
    assert sequence_entropy_loss(logits_TE, 2, ~valid_T & valid_T).item() == 0


def test_mutual_information_by_hand():
    # two tokens that are sure of different experts: H(p_t) of each less the even H of the mean
    logits_TE = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)], [0.0, 50.0]])
    valid_T = torch.tensor([True, True, False])
    assert mutual_information_loss(logits_TE, valid_T).item() == pytest.approx(SURE - EVEN)
    assert mutual_information_loss(logits_TE[:1]).item() == pytest.approx(0.0, abs=1e-6)  # one token tells nothing
    far_TE = torch.tensor([[1e4, 0.0], [0.0, 1e4]], requires_grad=True)
    loss = mutual_information_loss(far_TE)
    assert loss.item() == pytest.approx(-EVEN)
    loss.backward()
    assert far_TE.grad.isfinite().all()
    assert mutual_information_loss(logits_TE, ~valid_T & valid_T).item() == 0
