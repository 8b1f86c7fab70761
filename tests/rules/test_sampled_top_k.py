"""Top-k whose last experts are drawn: who is sure, how often the others come, and that evaluation draws nobody."""

from __future__ import annotations

import pytest
import torch

from crossways.errors import UserError
from crossways.gates import LinearGate
from crossways.router import Router
from crossways.rules.score import Softmax
from crossways.rules.select import SampledTopK, TopK

SCORES_BSE = torch.tensor([0.5, 0.3, 0.15, 0.05]).expand(1, 20_000, 4)


def shares(rule, allowed_BSE=None):
    """How often each expert is chosen, per token."""
    torch.manual_seed(0)
    return rule(SCORES_BSE, SCORES_BSE, allowed_BSE).load_E() / 20_000


def test_the_first_are_sure_and_the_last_are_drawn_in_proportion():
    # the best is sure; one of 0.3, 0.15, 0.05 is drawn: 0.6, 0.3, 0.1
    torch.testing.assert_close(
        shares(SampledTopK(2).in_training()), torch.tensor([1, 0.6, 0.3, 0.1]), atol=0.02, rtol=0
    )
    # two draws without replacement of all four: P(first or second)
    drawn_E = torch.tensor([0.5, 0.3, 0.15, 0.05])
    both_E = drawn_E + sum(drawn_E[i] * drawn_E / (1 - drawn_E[i]) * (torch.arange(4) != i) for i in range(4))
    torch.testing.assert_close(shares(SampledTopK(2, 2).in_training()), both_E, atol=0.02, rtol=0)


def test_evaluation_is_top_k():
    assert shares(SampledTopK(2)).tolist() == [1, 1, 0, 0]
    gate = LinearGate(3, 4)
    router, x_BSD = Router(4, Softmax(), SampledTopK(2), gate=gate), torch.randn(2, 50, 3)
    plain = Router(4, Softmax(), TopK(2), gate=gate)(x_BSD).assignment.to_mask()
    assert torch.equal(router.eval()(x_BSD).assignment.to_mask(), plain)
    drawn = router.train()(x_BSD).assignment.to_mask()
    assert not torch.equal(drawn, plain)
    assert torch.equal(drawn.sum(-1), torch.full((100,), 2))


def test_who_is_not_allowed_is_not_drawn():
    allowed_BSE = torch.ones_like(SCORES_BSE, dtype=torch.bool).clone()
    allowed_BSE[..., 1] = False
    allowed_BSE[:, :100] = False
    torch.testing.assert_close(
        shares(SampledTopK(2).in_training(), allowed_BSE), 0.995 * torch.tensor([1, 0, 0.75, 0.25]), atol=0.02, rtol=0
    )


def test_scores_of_zero_can_still_be_drawn():
    scores_BSE = torch.tensor([1.0, 0.0, 0.0]).expand(1, 100, 3)
    load_E = SampledTopK(2).in_training()(scores_BSE, scores_BSE).load_E()
    assert load_E[0] == 100
    assert load_E[1:].min() > 20


def test_more_draws_than_experts_are_refused():
    with pytest.raises(UserError, match="sampled = 3 exceeds k = 2"):
        SampledTopK(2, 3)
