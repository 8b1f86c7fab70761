"""Quantile balancing: prices by hand, as a step of descent on the dual, and in a router."""

from __future__ import annotations

import pytest
import torch

from crossways.errors import UserError
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.balance.quantile import balancing_price
from crossways.rules.score import Sigmoid, Softmax
from crossways.rules.select import TopK

# All four tokens prefer expert 0, by 2, 3, 1 and 1/2.
LOGITS_BSE = torch.tensor([[[2.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.5, 0.0]]])


def router_of(experts=2, k=1, momentum=0.0, score=None):
    router = Router(experts, score or Softmax(), TopK(k), gate=torch.nn.Identity(), price_momentum=momentum)
    router.gate.forward = lambda x_BSE, context=None: x_BSE
    return router.train()


def test_by_hand():
    router = router_of()
    routing = router(LOGITS_BSE)
    # offers of the expert not chosen are 0; q = 4 * 1 / 2 = 2; third greatest of 2, 3, 1, 1/2 and of 0, 0, 0, 0
    assert balancing_price(routing, router.bias).tolist() == [1.0, 0.0]
    router.observe(routing)
    assert router.bias.tolist() == [-0.5, 0.5]  # less the mean price, which changes no choice
    routing = router(LOGITS_BSE)
    assert routing.assignment.load_E()[0] in (2, 3)  # token 2 is indifferent now
    assert routing.assignment.to_mask()[[0, 1, 3], 0].tolist() == [True, True, False]
    scores_TE = LOGITS_BSE[0].softmax(-1)  # weights know no price
    mask_TE = routing.assignment.to_mask()
    torch.testing.assert_close(routing.assignment.to_dense(), scores_TE * mask_TE)


def test_momentum_keeps_a_share_of_the_old_prices():
    router = router_of(momentum=0.75)
    router.observe(router(LOGITS_BSE))
    assert router.bias.tolist() == [-0.125, 0.125]
    router.observe(router(LOGITS_BSE))  # the offers are now 1/8 less, and so the price of expert 0 is what it was
    torch.testing.assert_close(router.bias, torch.tensor([-0.21875, 0.21875]))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("score", [Softmax(), Sigmoid()], ids=str)
def test_loads_become_level(k, score):
    torch.manual_seed(0)
    logits_BSE = torch.randn(2, 200, 8) + torch.linspace(0, 3, 8)
    router = router_of(8, k, score=score)
    before_E = router(logits_BSE).assignment.load_E()
    for _ in range(10):
        router.observe(router(logits_BSE))
    after_E = router(logits_BSE).assignment.load_E().float()
    assert before_E.max() > 2 * before_E.float().mean()
    assert after_E.max() < 1.1 * after_E.mean()
    assert torch.equal(router.eval()(logits_BSE).assignment.load_E().float(), after_E)


def test_padding_has_no_say():
    router, other = router_of(), router_of()
    padded_BSE = torch.cat([LOGITS_BSE, torch.tensor([[[-9.0, 9.0]] * 3])], 1)
    valid_BS = torch.tensor([[True] * 4 + [False] * 3])
    router.observe(router(LOGITS_BSE))
    other.observe(other(padded_BSE, Context(valid_BS=valid_BS)))
    assert torch.equal(router.bias, other.bias)
    other.observe(other(padded_BSE, Context(valid_BS=torch.zeros_like(valid_BS))))
    assert torch.equal(router.bias, other.bias)


def test_the_passes_of_a_step_share_its_prices():
    router = router_of()
    first, second = router(LOGITS_BSE), router(2 * LOGITS_BSE)
    router.observe(first, step_ends=False)
    assert not router.bias.any()
    router.observe(second, step_ends=False)
    router.finish_step()
    assert router.bias.tolist() == [-0.75, 0.75]  # prices (1, 0) and (2, 0)
    router.finish_step()  # nothing was seen since
    assert router.bias.tolist() == [-0.75, 0.75]


def test_one_bias_is_enough():
    with pytest.raises(UserError, match="choose one"):
        Router(2, Softmax(), TopK(1), price_momentum=0.0, bias_update_rate=0.001)
