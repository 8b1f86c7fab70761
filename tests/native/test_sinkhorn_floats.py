"""Sinkhorn's choice in floats: it must be that of doubles, and must not be taken where floats cannot tell.

Legend: B batch, S sequence, E experts, G groups, N tokens of a group.
"""

import pytest
import torch

from crossways.native import budgeted, routing, why_not_native
from crossways.rules.select import Sinkhorn, TopK

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


def logits_of(kind, shape):
    """Logits (B, S, E) of which floats can say more or less."""
    logits_BSE = torch.randn(shape)
    if kind == "apart":
        return logits_BSE + 3 * torch.randn(shape[-1])
    if kind == "far":
        return 15 * logits_BSE
    if kind == "ties":
        return (2 * logits_BSE).round() / 2
    if kind == "near ties":  # few, as one tie would keep floats from deciding anything
        for _ in range(4):
            best_BSK, index_BSK = Sinkhorn().balance(logits_BSE).topk(2, -1)
            step_BSE = torch.zeros(shape).scatter_(-1, index_BSK[..., 1:], best_BSK.log().diff(dim=-1).neg())
            logits_BSE[:, ::150] += step_BSE[:, ::150]
    if kind == "alike":
        return torch.zeros(shape)
    if kind == "odd":
        logits_BSE[0, 3, 4], logits_BSE[0, 5, 6], logits_BSE[-1, 7] = torch.nan, torch.inf, -torch.inf
    return logits_BSE


@pytest.mark.parametrize("group", ["sequence", "batch"])
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("shape", [(2, 40, 16), (3, 1100, 32), (2, 516, 64), (1, 513, 64)], ids=str)
@pytest.mark.parametrize("kind", ["plain", "apart", "far", "ties", "near ties", "alike", "odd"])
def test_the_choice_is_that_of_doubles(monkeypatch, kind, shape, k, group):
    monkeypatch.setattr(routing, "_SMALL", 0)
    torch.manual_seed(k)
    rule, logits_BSE = Sinkhorn(k=k, group=group), logits_of(kind, shape)
    grouped_GNE = logits_BSE if group == "sequence" else logits_BSE.reshape(1, -1, shape[-1])
    balanced_BSE = rule.balance(grouped_GNE).view(shape)
    expected = TopK(k)(balanced_BSE, logits_BSE).to_mask()
    assert torch.equal(rule(logits_BSE, logits_BSE).to_mask(), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_when_to_stop_is_decided_by_doubles(threads):
    """At a tolerance that is the first round's change but for less than floats know."""
    torch.manual_seed(0)
    logits_GNE = torch.randn(1, 2048, 64) + 0.5 * torch.randn(64)
    mass_NE = (logits_GNE[0].double() - logits_GNE[0].double().amax(-1, keepdim=True)).exp().float().double()
    row_N1 = 1 / (2048 * (mass_NE.sum(-1, keepdim=True) + 1e-8))
    change = (1 / (64 * ((row_N1 * mass_NE).sum(0) + 1e-8)) - 1).abs().mean().item()
    before, chosen = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        for tolerance in (change * (1 - 1e-9), change * (1 + 1e-9)):
            found = budgeted.of_sinkhorn(logits_GNE, 1, 100, tolerance, None, None).mask()
            balanced_NE = budgeted.sinkhorn(logits_GNE, None, 100, tolerance)[0]
            assert torch.equal(found, TopK(1)(balanced_NE[None], logits_GNE).to_mask())
            chosen.append(found)
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(*chosen)
