"""Top-p and positive: by hand, caps, and the fewest experts that reach p."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.gates import LinearGate
from crossways.router import Router
from crossways.rules.score import Relu, Softmax
from crossways.rules.select import Positive, TopP


def chosen(rule, scores_TE, allowed_TE=None):
    """Experts of each token, in index order."""
    allowed_BSE = None if allowed_TE is None else allowed_TE[None]
    mask_TE = rule(scores_TE[None], scores_TE[None], allowed_BSE).to_mask()
    return [row.nonzero().flatten().tolist() for row in mask_TE]


PROBS_TE = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.3, 0.25, 0.35], [0.25, 0.25, 0.25, 0.25]])


def test_top_p_by_hand():
    assert chosen(TopP(0.4), PROBS_TE)[:2] == [[0], [1, 3]]  # 0.35 is short of 0.4, 0.65 is not
    assert [len(experts) for experts in chosen(TopP(0.4), PROBS_TE)] == [1, 2, 2]
    assert [len(experts) for experts in chosen(TopP(0.5), PROBS_TE)] == [1, 2, 2]  # reached exactly is reached
    assert chosen(TopP(0.95), PROBS_TE) == [[0, 1, 2, 3]] * 3
    assert [len(experts) for experts in chosen(TopP(0.95, cap=2), PROBS_TE)] == [2, 2, 2]
    assert chosen(TopP(0.95, cap=1), PROBS_TE)[:2] == [[0], [3]]


def test_disabled_experts_lend_no_probability():
    allowed_TE = torch.ones_like(PROBS_TE, dtype=torch.bool)
    allowed_TE[0, 0] = False
    assert chosen(TopP(0.4), PROBS_TE, allowed_TE)[0] == [1, 2]  # 0.2 + 0.2
    assert chosen(TopP(0.6), PROBS_TE, allowed_TE)[0] == [1, 2, 3]  # all that is left


@settings(deadline=None, max_examples=100, derandomize=True)
@given(st.integers(1, 5), st.floats(0.01, 1.0), st.sampled_from([0.0, 1.0, 50.0]), st.integers(0, 2**16))
def test_top_p_is_the_smallest_set_that_reaches_p(experts, p, scale, seed):
    logits_TE = torch.randn(4, experts, generator=torch.Generator().manual_seed(seed))
    probs_TE = (scale * logits_TE).softmax(-1)

    def smallest(probs_E, reached):
        sizes = range(1, experts + 1)
        reach = (size for size in sizes if any(sum(s) >= reached for s in itertools.combinations(probs_E, size)))
        return min(reach, default=experts)

    for probs_E, taken in zip(probs_TE, chosen(TopP(p), probs_TE), strict=True):
        # A sum may round to either side of p, and the rest of a sharp distribution may be less than that.
        assert smallest(probs_E.tolist(), p - 1e-6) <= len(taken) <= smallest(probs_E.tolist(), p + 1e-6)
        assert probs_E[taken].sum() >= p - 1e-5
        if len(taken) > 1:
            assert probs_E[taken].sum() - probs_E[taken].min() < p + 1e-5


def test_positive_by_hand():
    scores_TE = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1e-30, 3.0]])
    assert chosen(Positive(), scores_TE) == [[1], [], [0, 1, 2]]
    assert chosen(Positive(), scores_TE, torch.tensor([[True, False, True]] * 3)) == [[], [], [0, 2]]


def test_remoe_is_continuous_where_an_expert_enters():
    gate = LinearGate(2, 2)
    gate.weight.data = torch.eye(2)
    for logit in (-1e-6, 1e-6):
        routing = Router(2, Relu(), Positive(), gate=gate)(torch.tensor([[[logit, 1.0]]]))
        assert routing.assignment.num_pairs == (2 if logit > 0 else 1)
        torch.testing.assert_close(routing.assignment.to_dense(), torch.tensor([[0.0, 1.0]]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("rule", [TopP(0.5), Positive()], ids=str)
def test_gradients_reach_the_gate_through_the_weights(rule):
    torch.manual_seed(0)
    router = Router(4, Relu() if isinstance(rule, Positive) else Softmax(), rule, gate=LinearGate(8, 4))
    routing = router(torch.randn(2, 6, 8))
    (routing.assignment.weight_P * torch.randn_like(routing.assignment.weight_P)).sum().backward()
    assert router.gate.weight.grad.abs().sum(1).all()
