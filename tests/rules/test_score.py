"""Scores against numbers worked out by hand from each paper's equation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.rules.probe import Properties, check_score, probe_score
from crossways.rules.score import (
    AmongTop,
    Relu,
    Sigmoid,
    Softmax,
    SqrtSoftplus,
    Unified,
    build_score,
    score_catalogue,
)

LOG2, LOG3 = math.log(2), math.log(3)
LOGITS_BSE = torch.tensor([[[0.0, LOG2, LOG3, 0.0]]])


def test_softmax_by_hand():
    # e^s = 1, 2, 3, 1, sum 7
    torch.testing.assert_close(Softmax()(LOGITS_BSE)[0, 0], torch.tensor([1, 2, 3, 1]) / 7)


def test_relu_by_hand():
    assert Relu()(torch.tensor([[[-1.0, 0.0, 2.5]]])).tolist() == [[[0.0, 0.0, 2.5]]]


def test_sigmoid_by_hand():
    # sigmoid(log a) = a / (1 + a)
    torch.testing.assert_close(Sigmoid()(LOGITS_BSE)[0, 0], torch.tensor([1 / 2, 2 / 3, 3 / 4, 1 / 2]))


def test_among_top_by_hand():
    # softmax 1, 2, 3, 1 of 7; the two greatest sum to 5 / 7
    torch.testing.assert_close(AmongTop(2)(LOGITS_BSE)[0, 0], torch.tensor([1, 2, 3, 1]) / 5)
    # sigmoid 1/2, 2/3, 3/4, 1/2; the three greatest sum to 23 / 12
    expected_E = torch.tensor([6 / 23, 8 / 23, 9 / 23, 6 / 23])
    torch.testing.assert_close(AmongTop(3, "sigmoid")(LOGITS_BSE)[0, 0], expected_E)
    torch.testing.assert_close(AmongTop(9)(LOGITS_BSE), Softmax()(LOGITS_BSE))


@pytest.mark.parametrize("wrong", [{"k": 0}, {"k": 1.5}, {"k": True}, {"of": "relu"}])
def test_impossible_fields_of_among_top_are_refused(wrong):
    with pytest.raises(UserError, match="among_top"):
        build_score({"name": "among_top", **wrong})


def test_unified_by_hand():
    # alpha softmax + (1 - alpha) 2 sigmoid / E, E = 4
    expected_E = [
        0.25 * p / 7 + 0.75 * s / 2 for p, s in zip([1, 2, 3, 1], [1 / 2, 2 / 3, 3 / 4, 1 / 2], strict=True)
    ]
    torch.testing.assert_close(Unified(0.25)(LOGITS_BSE)[0, 0], torch.tensor(expected_E))


def test_unified_at_its_ends_and_at_zero_logits():
    assert torch.equal(Unified(1.0)(LOGITS_BSE), Softmax()(LOGITS_BSE))
    torch.testing.assert_close(Unified(0.0)(LOGITS_BSE), Sigmoid()(LOGITS_BSE) / 2)
    torch.testing.assert_close(Unified(0.3)(torch.zeros(1, 1, 4)), torch.full((1, 1, 4), 0.25))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, "half"])
def test_alpha_outside_the_unit_interval_is_refused(alpha):
    with pytest.raises(UserError, match="unified"):
        build_score({"name": "unified", "alpha": alpha})


@pytest.mark.parametrize("name", sorted(score_catalogue()))
def test_declared_properties_hold(name):
    rule = build_score(name)
    check_score(rule)
    assert probe_score(rule) == Properties(rule.causal, rule.batch_invariant, padding_inert=True)


def test_the_probe_finds_a_score_that_looks_around():
    class OverTokens(Softmax):  # no name of its own, so that no catalogue lists it
        def __call__(self, logits_BSE, valid_BS=None):
            return logits_BSE.softmax(1)

    with pytest.raises(ValueError, match="causal is declared True but observed False"):
        check_score(OverTokens())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from([Softmax(), Sigmoid(), Relu(), SqrtSoftplus(), Unified(0.5), Unified(0.0)]),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=6),
)
def test_scores_are_finite_non_negative_and_keep_the_order(rule, values):
    logits_BSE = torch.tensor(values)[None, None]
    scores_BSE = rule(logits_BSE)
    assert scores_BSE.shape == logits_BSE.shape
    assert scores_BSE.dtype == torch.float32
    assert bool(scores_BSE.isfinite().all())
    assert bool((scores_BSE >= 0).all())
    order = logits_BSE.flatten().argsort()
    assert bool((scores_BSE.flatten()[order].diff() >= -1e-6).all())


def test_a_logit_of_minus_infinity_is_a_score_of_zero():
    logits_BSE = torch.tensor([[[0.0, -math.inf, 1.0]]])
    for rule in (Softmax(), Sigmoid(), SqrtSoftplus(), Unified(0.5)):
        scores_BSE = rule(logits_BSE)
        assert scores_BSE[0, 0, 1] == 0
        assert bool(scores_BSE.isfinite().all())


def test_a_broken_logit_is_not_hidden():
    for rule in (Softmax(), Sigmoid(), SqrtSoftplus(), Unified(0.5)):
        assert rule(torch.tensor([[[0.0, math.nan]]])).isnan().any()


def test_square_root_of_softplus_by_hand():
    # softplus(log(e^4 - 1)) = 4 and softplus(log(e - 1)) = 1
    logits_BSE = torch.tensor([[[math.log(math.exp(4) - 1), math.log(math.e - 1), 0.0]]])
    torch.testing.assert_close(SqrtSoftplus()(logits_BSE), torch.tensor([[[2.0, 1.0, math.sqrt(math.log(2))]]]))


def test_square_root_of_softplus_has_a_finite_slope_everywhere():
    logits_BSE = torch.tensor([[[-1e4, -200.0, -88.0, -50.0, 0.0, 1e4]]], requires_grad=True)
    SqrtSoftplus()(logits_BSE).sum().backward()
    assert logits_BSE.grad.isfinite().all()
    # sigmoid(0) / (2 sqrt(log 2))
    assert logits_BSE.grad[0, 0, 4].item() == pytest.approx(0.25 / math.sqrt(math.log(2)))
