"""Budgets that many tokens share, where a sample says more or less of where the cut lies.

Legend: N tokens, E experts.
"""

import pytest
import torch

from crossways.native import budgeted, why_not_native

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


def keys_of(kind, tokens, experts):
    """What competes, (N, E)."""
    x_NE = torch.randn(tokens, experts)
    if kind == "ties":
        return x_NE.round()
    if kind == "alike":
        return torch.zeros_like(x_NE)
    if kind == "broken":
        return x_NE.masked_fill(torch.rand_like(x_NE) < 0.3, torch.nan)
    if kind == "in order":
        return x_NE.flatten().sort().values.view(tokens, experts)
    if kind == "above":  # the sampled tokens are greater than all others
        x_NE[::2] += 9
    if kind == "below":
        x_NE[::2] -= 9
    return x_NE


@pytest.mark.parametrize("kind", ["plain", "ties", "alike", "broken", "in order", "above", "below"])
@pytest.mark.parametrize("open_share", [1.0, 0.5, 0.01, 0.0])
@pytest.mark.parametrize(("tokens", "experts"), [(1024, 5), (4099, 20)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_budget_of_many_tokens(kind, open_share, tokens, experts, threads):
    torch.manual_seed(0)
    x_NE, groups = keys_of(kind, tokens, experts), budgeted.Groups(1, tokens, 0, 1)
    allowed_NE = None if open_share == 1 else torch.rand_like(x_NE) < open_share
    ranked_NE = x_NE.nan_to_num(torch.inf)
    if allowed_NE is not None:
        ranked_NE = ranked_NE.masked_fill(~allowed_NE, -torch.inf)
    order_P, before = ranked_NE.flatten().sort(descending=True, stable=True).indices, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for budget in (0, 1, 7, tokens // 3, tokens, 2 * tokens, x_NE.numel() - 1, x_NE.numel(), x_NE.numel() + 5):
            expected_NE = torch.zeros(x_NE.numel(), dtype=torch.bool)
            expected_NE[order_P[:budget]] = True
            expected_NE = expected_NE.view_as(x_NE) if allowed_NE is None else expected_NE.view_as(x_NE) & allowed_NE
            found = budgeted.of_shared_budgets(x_NE, groups, torch.tensor([budget]), allowed_NE)
            assert torch.equal(found.mask(), expected_NE)
            if allowed_NE is None and budget:
                least, last = budgeted.least_of_shared(x_NE, groups, budget)[0], x_NE.flatten()[order_P[:budget][-1]]
                torch.testing.assert_close(least, last, equal_nan=True, rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
