"""Weights of chosen pairs against numbers worked out by hand, and against the dense formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.weighing import check_renormalize, weighed

# Two tokens, four experts, of which the last two are zero experts.
SCORES_TE = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
MASK_TE = torch.tensor([[True, True, False, False], [False, True, False, True]])
ZERO = (2, 4)


def pairs():
    return Assignment.from_mask(MASK_TE, SCORES_TE)


def by_hand(renormalize, scale=1.0):
    return weighed(pairs(), SCORES_TE, renormalize, ZERO, scale).to_dense()


def test_as_they_are():
    assert torch.equal(by_hand(False), SCORES_TE * MASK_TE)
    torch.testing.assert_close(by_hand(False, 2.5), 2.5 * SCORES_TE * MASK_TE)


def test_summing_to_one():
    expected_TE = torch.tensor([[0.625, 0.375, 0, 0], [0, 1 / 3, 0, 2 / 3]])
    torch.testing.assert_close(by_hand(True), expected_TE)


def test_a_second_softmax():
    near, far = 1 / (1 + math.exp(-0.2)), 1 / (1 + math.exp(0.2))  # both tokens' scores are 0.2 apart
    expected_TE = torch.tensor([[near, far, 0, 0], [0, far, 0, near]])
    torch.testing.assert_close(by_hand("softmax"), expected_TE)
    torch.testing.assert_close(by_hand("softmax", 2.0), 2 * expected_TE)


def test_summing_to_one_with_all_zero_experts():
    # 0.5 and 0.3 beside 0.15 + 0.05 of zero experts that nobody chose; 0.2 beside 0.3 + 0.4, one of them chosen.
    expected_TE = torch.tensor([[0.5, 0.3, 0, 0], [0, 0.2 / 0.9, 0, 0.4 / 0.9]])
    torch.testing.assert_close(by_hand("with_zero"), expected_TE)


@pytest.mark.parametrize("renormalize", [False, True, "softmax", "with_zero"])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(0, 5), experts=st.integers(1, 6), bounded=st.booleans())
def test_the_dense_formula_and_its_gradient(renormalize, seed, tokens, experts, bounded):
    torch.manual_seed(seed)
    zero = (experts - 1, experts)
    mask_TE = torch.rand(tokens, experts) < 0.5
    raw_TE = (torch.rand(tokens, experts, dtype=torch.float64) * torch.randint(1, 9, (tokens, 1))).requires_grad_()
    slope_TE = torch.randn(tokens, experts, dtype=torch.float64)
    most = int(mask_TE.sum()) + 3
    build = Assignment.from_bounded_mask if bounded else Assignment.from_mask
    ours = weighed(build(mask_TE, raw_TE, most), raw_TE, renormalize, zero, 1.5)
    (ours_grad,) = torch.autograd.grad((ours.to_dense() * slope_TE).sum(), raw_TE)

    chosen_TE = torch.where(mask_TE, raw_TE, 0.0)
    if renormalize == "softmax":
        total_T1 = torch.where(mask_TE, raw_TE.exp(), 0.0).sum(-1, keepdim=True)
        dense_TE = torch.where(mask_TE, raw_TE.exp() / torch.where(total_T1 > 0, total_T1, 1.0), 0.0)
    elif renormalize:
        total_T1 = chosen_TE.sum(-1, keepdim=True)
        if renormalize == "with_zero":
            total_T1 = chosen_TE[:, :-1].sum(-1, keepdim=True) + raw_TE[:, -1:]
        dense_TE = chosen_TE / torch.where(mask_TE.any(-1, keepdim=True), total_T1, 1.0)
    else:
        dense_TE = chosen_TE
    (dense_grad,) = torch.autograd.grad((1.5 * dense_TE * slope_TE).sum(), raw_TE)
    torch.testing.assert_close(ours.to_dense(), 1.5 * dense_TE)
    torch.testing.assert_close(ours_grad, dense_grad)
    assert torch.equal(ours.to_mask(), mask_TE)


def test_great_scores_do_not_overflow():
    scores_TE = torch.tensor([[3000.0, 3000.0, 0.0, 0.0]])
    pairs = Assignment.from_mask(scores_TE > 0, scores_TE)
    torch.testing.assert_close(pairs.softmaxed().weight_P, torch.tensor([0.5, 0.5]))


def test_impossible_values():
    with pytest.raises(UserError, match="renormalize must be true, false or one of"):
        check_renormalize("sigmoid", 1)
    with pytest.raises(UserError, match="set zero_experts"):
        check_renormalize("with_zero", 0)
    check_renormalize("with_zero", 1)
    check_renormalize(True, 0)
