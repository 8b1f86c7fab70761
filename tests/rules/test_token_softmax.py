"""Scores that look at other tokens: by hand, their declared properties, padding, gradients and the decode twin."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.errors import UserError
from crossways.gates import LinearGate
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.probe import Probe, check_score, probe_score
from crossways.rules.score import Softmax, TokenSoftmax, Unified, build_score
from crossways.rules.select import Threshold, TopC, TopK

LOG2, LOG3 = math.log(2), math.log(3)
SCORES = [
    *(TokenSoftmax(group) for group in ("sequence", "batch")),
    *(Unified(alpha, "softmax_over_tokens", group) for alpha in (0.0, 0.5, 1.0) for group in ("sequence", "batch")),
]
LOOKING = [rule for rule in SCORES if rule != Unified(1.0, "softmax_over_tokens", getattr(rule, "group", ""))]


def test_by_hand():
    # exp(s) of two tokens, two experts: (1, 2) and (3, 2); columns sum to 4 and 4; n / E = 1
    logits_BSE = torch.tensor([[[0.0, LOG2], [LOG3, LOG2]]])
    expected_BSE = torch.tensor([[[1 / 4, 1 / 2], [3 / 4, 1 / 2]]])
    torch.testing.assert_close(TokenSoftmax()(logits_BSE), expected_BSE)
    # unified with alpha = 1/4: rows of the softmax over experts are (1/3, 2/3) and (3/5, 2/5)
    unified_BSE = Unified(0.25, "softmax_over_tokens")(logits_BSE)
    over_experts_BSE = torch.tensor([[[1 / 3, 2 / 3], [3 / 5, 2 / 5]]])
    torch.testing.assert_close(unified_BSE, 0.25 * over_experts_BSE + 0.75 * expected_BSE)


def test_groups_and_scale_by_hand():
    # two rows of one token: alone, each token has its expert's whole unit (n / E = 1/2); together, (1/4, 3/4) * 2/2
    logits_BSE = torch.tensor([[[0.0, LOG2]], [[LOG3, LOG2]]])
    torch.testing.assert_close(TokenSoftmax()(logits_BSE), torch.full((2, 1, 2), 0.5))
    expected_BSE = torch.tensor([[[1 / 4, 1 / 2]], [[3 / 4, 1 / 2]]])
    torch.testing.assert_close(TokenSoftmax("batch")(logits_BSE), expected_BSE)
    torch.testing.assert_close(TokenSoftmax()(torch.zeros(2, 7, 4)), torch.full((2, 7, 4), 0.25))


@pytest.mark.parametrize("rule", SCORES, ids=str)
def test_declared_properties_hold(rule):
    check_score(rule)


@pytest.mark.parametrize("rule", LOOKING, ids=str)
def test_they_declare_what_they_are(rule):
    assert not rule.causal
    assert rule.batch_invariant == (rule.group == "sequence")
    assert Unified(1.0, "softmax_over_tokens", "batch").causal


def test_the_probe_finds_false_claims():
    class Careless(TokenSoftmax):
        causal = True

    class Competing(TokenSoftmax):
        def __call__(self, logits_BSE, valid_BS=None):
            return super().__call__(logits_BSE)

    with pytest.raises(ValueError, match="causal is declared True but observed False"):
        check_score(Careless())
    with pytest.raises(ValueError, match="padding_inert is declared True but observed False"):
        check_score(Competing(), Probe(trials=10))


@pytest.mark.parametrize("rule", SCORES, ids=str)
def test_the_twin_is_causal_and_batch_invariant(rule):
    twin = rule.decode_twin().at(torch.tensor([0.1, 0.2, -0.3, 0.0]))
    observed = probe_score(twin)
    assert observed.causal
    assert observed.batch_invariant
    assert twin.causal
    assert twin.batch_invariant
    if rule.causal and rule.batch_invariant:
        assert rule.decode_twin() is rule


@pytest.mark.parametrize("rule", LOOKING, ids=str)
def test_with_the_normaliser_of_the_batch_the_twin_is_the_score_over_the_batch(rule):
    logits_BSE, valid_BS = torch.randn(3, 5, 4), torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 5])
    twin = rule.decode_twin().at(rule.normaliser(logits_BSE, valid_BS))
    over_batch = (
        TokenSoftmax("batch") if isinstance(rule, TokenSoftmax) else Unified(rule.alpha, rule.expert_part, "batch")
    )
    torch.testing.assert_close(twin(logits_BSE)[valid_BS], over_batch(logits_BSE, valid_BS)[valid_BS])


def test_a_twin_without_estimate_says_so():
    for rule in (TokenSoftmax(), Unified(0.5, "softmax_over_tokens")):
        with pytest.raises(UserError, match="no running normaliser"):
            rule.decode_twin()(torch.zeros(1, 1, 2))


@pytest.mark.parametrize("rule", LOOKING, ids=str)
def test_padding_gets_no_gradient_and_gives_no_nan(rule):
    logits_BSE = torch.randn(2, 3, 4, requires_grad=True)
    valid_BS = torch.tensor([[True, True, False], [False] * 3])
    rule(logits_BSE, valid_BS)[valid_BS].square().sum().backward()
    assert logits_BSE.grad.isfinite().all()
    assert not logits_BSE.grad[~valid_BS].any()
    assert logits_BSE.grad[valid_BS].any()
    assert rule.normaliser(logits_BSE, torch.zeros(2, 3, dtype=torch.bool)).isnan().all()


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    st.sampled_from(SCORES), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.sampled_from([0.0, 1.0, 1e3])
)
def test_scores_are_finite_and_experts_share_their_unit(rule, batch, sequence, experts, scale):
    logits_BSE = scale * torch.randn(batch, sequence, experts)
    valid_BS = torch.rand(batch, sequence) < 0.7
    scores_BSE = rule(logits_BSE, valid_BS)
    assert scores_BSE.isfinite().all()
    assert (scores_BSE >= 0).all()
    if isinstance(rule, TokenSoftmax):
        counted_BSE = torch.where(valid_BS[..., None], scores_BSE, 0.0)
        total = counted_BSE.sum().item()
        assert total == pytest.approx(int(valid_BS.sum()), rel=1e-4, abs=1e-4)


def test_a_broken_logit_is_not_hidden():
    logits_BSE = torch.tensor([[[0.0, math.nan], [0.0, 1.0]]])
    assert TokenSoftmax()(logits_BSE)[..., 1].isnan().any()


@pytest.mark.parametrize("spec", [{"group": "position"}, {"group": None}], ids=str)
def test_impossible_scores_are_refused(spec):
    with pytest.raises(UserError):
        build_score({"name": "token_softmax", **spec})
    with pytest.raises(UserError):
        build_score({"name": "unified", **spec})
    with pytest.raises(UserError, match="expert_part"):
        build_score({"name": "unified", "expert_part": "relu"})


def router_of(score, select):
    torch.manual_seed(0)
    gate = LinearGate(8, 4)
    gate.reset_parameters(std=1.0)
    return Router(4, score, select, gate=gate, cutoff_momentum=0.9)


def test_the_router_keeps_a_running_normaliser():
    router = router_of(TokenSoftmax(), TopK(2)).train()
    assert router.normaliser.isnan().all()
    first, second = router(torch.randn(2, 5, 8)), router(torch.randn(2, 5, 8))
    router.observe(first)
    torch.testing.assert_close(router.normaliser, first.logits_TE.logsumexp(0) - math.log(10))
    router.observe(second)
    expected_E = 0.9 * first.normaliser_E + 0.1 * second.normaliser_E
    torch.testing.assert_close(router.normaliser, expected_E)
    causal = router.eval()(torch.randn(1, 3, 8), Context(causal=True))
    torch.testing.assert_close(causal.scores_TE, (causal.logits_TE - expected_E).exp() / 4)
    assert causal.normaliser_E is None
    assert "normaliser" not in router_of(Softmax(), TopK(2)).state_dict()


def test_an_uncalibrated_score_says_what_to_do():
    router = router_of(TokenSoftmax(), TopK(2)).eval()
    router(torch.randn(1, 2, 8))
    with pytest.raises(UserError, match="no normaliser yet"):
        router(torch.randn(1, 2, 8), Context(causal=True))


@pytest.mark.parametrize("select", [TopC(1.5), Threshold(k=1.5)], ids=str)
def test_the_cutoff_is_that_of_the_twins_scores(select):
    router = router_of(TokenSoftmax(), select).train()
    x_BSD = torch.randn(4, 16, 8)
    router.observe(router(x_BSD))
    causal = router.eval()(x_BSD, Context(causal=True))
    assert causal.assignment.num_pairs == 96  # the twin spends 1.5 a token on the batch it was estimated on


def test_padding_does_not_move_the_normaliser():
    router = router_of(TokenSoftmax(), TopC(1.5)).train()
    x_BSD, valid_BS = torch.randn(1, 4, 8), torch.tensor([[True, True, False, False]])
    padded, alone = router(x_BSD, Context(valid_BS=valid_BS)), router(x_BSD[:, :2])
    torch.testing.assert_close(padded.normaliser_E, alone.normaliser_E)
    torch.testing.assert_close(padded.cutoff_C, alone.cutoff_C)
    before_E = router(x_BSD).normaliser_E
    router.observe(router(x_BSD))
    router.observe(router(x_BSD, Context(valid_BS=torch.zeros(1, 4, dtype=torch.bool))))
    assert torch.equal(router.normaliser, before_E)
