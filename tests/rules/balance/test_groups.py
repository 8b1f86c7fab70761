"""DeepSeek-V2's device-level and communication losses by hand."""

from __future__ import annotations

import math

import pytest
import torch

from crossways.assignment import Assignment
from crossways.rules.balance import communication_balance_loss, device_balance_loss, load_balance_loss

# Two tokens with probabilities (1/2, 1/4, 1/8, 1/8): P' = (3/4, 1/4) for two groups of two experts.
LOGITS_TE = torch.tensor([[math.log(4), math.log(2), 0.0, 0.0]] * 2)


def chosen(*rows, num_experts=4):
    mask_TE = torch.zeros(len(rows), num_experts, dtype=torch.bool)
    for token, experts in enumerate(rows):
        mask_TE[token, list(experts)] = True
    return Assignment.from_mask(mask_TE, mask_TE.float())


def test_by_hand():
    assignment = chosen({0, 1}, {0, 2})
    # f = 4 (2, 1, 1, 0) / 4, so f' = (3/2, 1/2): 3/2 * 3/4 + 1/2 * 1/4
    assert device_balance_loss(LOGITS_TE, assignment, 2).item() == pytest.approx(1.25)
    # both tokens visit the first group, one the second; M = 2, T = 2: f'' = 2 / 4 * (2, 1)
    assert communication_balance_loss(LOGITS_TE, assignment, 2, 2).item() == pytest.approx(0.75 + 0.5 * 0.25)
    # with M = 1 the same traffic is twice the allowed one
    assert communication_balance_loss(LOGITS_TE, assignment, 2, 1).item() == pytest.approx(2 * 0.875)


def test_they_see_groups_only():
    level_TE = torch.zeros(2, 4)
    within, across = chosen({0}, {2}), chosen({0}, {1})
    assert device_balance_loss(level_TE, within, 2).item() == pytest.approx(1.0)
    skewed_TE = torch.tensor([[5.0, 5.0, 0.0, 0.0]] * 2)
    balanced = device_balance_loss(skewed_TE, within, 2).item()
    assert balanced == pytest.approx(1.0)  # f' is even, so P' sums to one whatever it is
    assert device_balance_loss(skewed_TE, across, 2).item() > 1.9
    assert communication_balance_loss(skewed_TE, across, 2, 1).item() > 1.9


def test_groups_of_one_expert_are_the_usual_loss():
    torch.manual_seed(0)
    logits_TE, assignment = torch.randn(3, 4), chosen({0, 3}, {1, 2}, {0, 1})
    torch.testing.assert_close(
        device_balance_loss(logits_TE, assignment, 4), load_balance_loss(logits_TE, assignment)
    )
    # a token visits as many groups of one as it has experts: the same again
    torch.testing.assert_close(
        communication_balance_loss(logits_TE, assignment, 4, 2), load_balance_loss(logits_TE, assignment)
    )


def test_padding_and_gradients():
    logits_TE = torch.cat([LOGITS_TE, torch.tensor([[0.0, 0.0, 9.0, 9.0]])]).requires_grad_()
    valid_T, assignment = torch.tensor([True, True, False]), chosen({0, 1}, {0, 2}, set())
    device = device_balance_loss(logits_TE, assignment, 2, valid_T)
    communication = communication_balance_loss(logits_TE, assignment, 2, 2, valid_T)
    assert device.item() == pytest.approx(1.25)
    assert communication.item() == pytest.approx(0.875)
    (device + communication).backward()
    assert logits_TE.grad[:2].any()
    assert not logits_TE.grad[2].any()
    none = chosen(set(), set(), set())
    assert device_balance_loss(logits_TE, none, 2, ~valid_T & valid_T) == 0
    assert communication_balance_loss(logits_TE, none, 2, 2, ~valid_T & valid_T) == 0


def test_rows_are_sequences_of_their_own():
    """Balance within each sequence: two one-sided rows that mirror each other look balanced together, not apart."""
    skewed_TE = torch.tensor([[5.0, 5.0, 0.0, 0.0], [0.0, 0.0, 5.0, 5.0]])
    assignment = chosen({0}, {2})
    for loss in (
        lambda rows: device_balance_loss(skewed_TE, assignment, 2, None, rows),
        lambda rows: communication_balance_loss(skewed_TE, assignment, 2, 1, None, rows),
    ):
        assert loss(1).item() == pytest.approx(1.0)
        assert loss(2).item() == pytest.approx(2 / (1 + math.exp(-5)), rel=1e-4)
    # a row of padding counts as zero
    half = device_balance_loss(skewed_TE, chosen({0}, set()), 2, torch.tensor([True, False]), 2)
    assert half.item() == pytest.approx(1 / (1 + math.exp(-5)), rel=1e-4)
