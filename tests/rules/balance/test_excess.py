"""StableMoE's balance loss by hand."""

from __future__ import annotations

import math

import pytest
import torch

from crossways.assignment import Assignment
from crossways.rules.balance import excess_load_loss


def top_1(experts, num_experts=2):
    index_T1 = torch.tensor(experts)[:, None]
    return Assignment.from_topk(index_T1, torch.ones(len(experts), 1), num_experts)


def test_by_hand():
    # loads (3, 1), mean 2: factors (1/2, -1/2); affinities 1/2 three times, and 3/4
    logits_TE = torch.tensor([[0.0, 9.0], [0.0, -9.0], [0.0, 9.0], [9.0, math.log(3)]])
    loss = excess_load_loss(logits_TE, top_1([0, 0, 0, 1]))
    assert loss.item() == pytest.approx((0.5 * 1.5 - 0.5 * 0.75) / 4)


def test_it_pushes_crowded_affinities_down_and_others_up():
    logits_TE = torch.zeros(4, 2, requires_grad=True)
    excess_load_loss(logits_TE, top_1([0, 0, 0, 1])).backward()
    assert (logits_TE.grad[:3, 0] > 0).all()
    assert logits_TE.grad[3, 1] < 0
    assert not logits_TE.grad[:3, 1].any()  # pairs that were not executed are left alone


def test_equal_loads_and_padding_cost_nothing():
    logits_TE = torch.randn(4, 2, requires_grad=True)
    assert excess_load_loss(logits_TE, top_1([0, 1, 1, 0])).item() == 0
    nobody = Assignment.from_mask(torch.zeros(4, 2, dtype=torch.bool), torch.zeros(4, 2))
    loss = excess_load_loss(logits_TE, nobody, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not logits_TE.grad.any()


def test_the_mean_is_over_valid_tokens():
    logits_TE = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 5.0]])
    mask_TE = torch.tensor([[True, False], [True, False], [False, False]])
    loss = excess_load_loss(
        logits_TE, Assignment.from_mask(mask_TE, mask_TE.float()), torch.tensor([True, True, False])
    )
    assert loss.item() == pytest.approx((2 / 1 - 1) * (0.5 + 0.5) / 2)
