"""BASE's assignment in C++, which looks at few tokens first, against scipy's optimum.

Legend: N tokens, E experts.
"""

import pytest
import torch
from torch.nn.functional import one_hot

from crossways.native import routing, why_not_native
from crossways.rules.select.base_layer import _solved

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


def gains_of(kind, tokens, experts):
    """Gains (N, E) of which few tokens or many have to move, and by more or less."""
    gain_NE = torch.randn(tokens, experts)
    if kind == "ties":
        return gain_NE.round()
    if kind == "wanted":  # some experts are in more demand
        return gain_NE + 4 * torch.randn(experts)
    if kind == "one expert":
        gain_NE = 5 * gain_NE
        gain_NE[:, 0] += 30
    if kind == "sure":  # nobody is near to being moved
        return gain_NE.softmax(-1) + 50 * one_hot(gain_NE[:, : experts // 2].argmax(-1), experts)
    if kind == "alike":
        return torch.randn(tokens, 4).repeat(1, experts // 4 + 1)[:, :experts] + 1e-3 * gain_NE
    return gain_NE


@pytest.mark.parametrize("kind", ["plain", "ties", "wanted", "one expert", "sure", "alike"])
@pytest.mark.parametrize(("tokens", "experts"), [(40, 3), (257, 8), (333, 20), (512, 64)])
def test_the_total_is_the_optimum(kind, tokens, experts):
    torch.manual_seed(tokens)
    gain_NE, place_N = gains_of(kind, tokens, experts), torch.arange(tokens)
    chosen_N = routing.balanced(gain_NE, torch.tensor([0, tokens]))
    best = gain_NE.double()[place_N, _solved(gain_NE.double())].sum().item()
    assert gain_NE.double()[place_N, chosen_N].sum().item() == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert chosen_N.bincount(minlength=experts).max() <= -(-tokens // experts)
    assert torch.equal(chosen_N, routing.balanced(gain_NE.double(), torch.tensor([0, tokens])))


def test_gains_that_only_doubles_can_hold():
    gain_NE = torch.randn(300, 8).double() * 1e300
    chosen_N = routing.balanced(gain_NE, torch.tensor([0, 300]))
    best = gain_NE[torch.arange(300), _solved(gain_NE)].sum().item()
    assert gain_NE[torch.arange(300), chosen_N].sum().item() == pytest.approx(best, rel=1e-12)
    gain_NE[7, 3] = torch.nan
    assert routing.balanced(gain_NE, torch.tensor([0, 300])) is None
