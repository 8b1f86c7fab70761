"""The decision for few tokens in one call against the rule itself, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.native import why_not_native
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Softmax
from crossways.rules.select import Threshold, TopC, TopK
from crossways.rules.select import few as module
from crossways.rules.select.few import few_pairs
from crossways.surgery.site_router import GivenLogits

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


def decided(router, logits_BSE, context):
    with torch.no_grad():
        return router(logits_BSE, context).assignment


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 4),
    length=st.integers(1, 4),
    experts=st.integers(1, 20),
    rule=st.sampled_from(["number", "one", "each", "top_k"]),
    renormalize=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_rule_itself(rows, length, experts, rule, renormalize, scale, padded, seed):
    generator = torch.Generator().manual_seed(seed)
    cutoff_E = torch.rand(experts, generator=generator) * 2 / experts
    value = {"number": 1.0 / experts, "one": cutoff_E[:1], "each": cutoff_E, "top_k": None}[rule]
    select = TopK(1 + seed % experts) if rule == "top_k" else Threshold(value=value)
    router = Router(
        experts, Softmax(), select, renormalize=renormalize, weight_scale=scale, gate=GivenLogits()
    ).eval()
    logits_BSE = torch.randn(rows, length, experts, generator=generator)
    if seed % 7 == 0:
        logits_BSE[0, 0] = torch.nan
    valid_BS = torch.rand(rows, length, generator=generator) < 0.7 if padded else None
    quick = decided(router, logits_BSE, Context(valid_BS=valid_BS))
    before, module.MOST = module.MOST, 0
    try:
        plain = decided(router, logits_BSE, Context(valid_BS=valid_BS))
    finally:
        module.MOST = before
    assert quick.num_tokens == plain.num_tokens
    for name in ("token_P", "expert_P", "offsets_E1"):
        assert torch.equal(getattr(quick, name), getattr(plain, name)), name
    torch.testing.assert_close(quick.weight_P, plain.weight_P, rtol=0, atol=0, equal_nan=True)


def taken(rule, choice_BSE, scores_BSE=None, allowed_BSE=None):
    scores_BSE = choice_BSE if scores_BSE is None else scores_BSE
    return few_pairs(rule, choice_BSE, scores_BSE, allowed_BSE, renormalize=False, weight_scale=1.0) is not None


def test_what_it_leaves_to_the_rule():
    choice_BSE = torch.rand(2, 2, 4)
    assert taken(TopK(2), choice_BSE)
    assert taken(Threshold(value=0.3), choice_BSE)
    assert not taken(Threshold(), choice_BSE), "without a cutoff the rule says what is missing"
    assert not taken(TopC(1.0), choice_BSE)
    assert not taken(TopK(2), choice_BSE, allowed_BSE=choice_BSE > 0.2)
    assert not taken(TopK(2), torch.rand(2, 200, 4))
    assert not taken(TopK(2), choice_BSE.double())
    assert not taken(TopK(2), choice_BSE, choice_BSE.clone().requires_grad_())


def test_of_equals_it_takes_those_that_the_rule_takes():
    choice_BSE = torch.ones(2, 1, 9)
    quick = few_pairs(TopK(3), choice_BSE, choice_BSE, None, renormalize=False, weight_scale=1.0)
    assert torch.equal(quick.to_mask(), TopK(3)(choice_BSE, choice_BSE).to_mask())
