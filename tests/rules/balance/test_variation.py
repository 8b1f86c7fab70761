"""The load loss of Shazeer et al. by hand, and against redrawing the noise."""

from __future__ import annotations

import pytest
import torch

from crossways.assignment import Assignment
from crossways.rules.balance import load_loss
from crossways.rules.select import TopK


def top_k(noisy_TE, k, valid_T=None):
    allowed_BSE = None if valid_T is None else valid_T[None, :, None].expand(1, *noisy_TE.shape)
    return TopK(k)(noisy_TE[None], noisy_TE.softmax(-1)[None], allowed_BSE)


def test_one_token_by_hand():
    # k = 1, expert 0 wins with 3: its rival is 1, that of the others is 3.
    # P = (Phi((2 - 1) / 1), Phi((1 - 3) / 2), Phi((0 - 3) / 0.5)) = (0.841345, 0.158655, 0), mean 1 / 3,
    # squares 0.707861 and 0.025171: CV^2 = 3 (0.707861 + 0.025171) - 1
    noisy_TE, clean_TE = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    scale_TE = torch.tensor([[1.0, 2.0, 0.5]])
    loss = load_loss(noisy_TE, clean_TE, scale_TE, top_k(noisy_TE, 1))
    assert loss.item() == pytest.approx(3 * (0.707861 + 0.025171) - 1, abs=1e-5)
    # k = 2: the rival of the chosen 0 and 1 is the 0 of expert 2, whose rival is 1
    # P = (Phi(2), Phi(1 / 2), Phi(-2)) = (0.977250, 0.691462, 0.022750)
    loss = load_loss(noisy_TE, clean_TE, scale_TE, top_k(noisy_TE, 2))
    mean = (0.977250 + 0.691462 + 0.022750) / 3
    variance = (0.977250**2 + 0.691462**2 + 0.022750**2) / 3 - mean**2
    assert loss.item() == pytest.approx(variance / mean**2, abs=1e-5)


def test_loads_add_up_over_tokens():
    # Two tokens that mirror each other: equal loads, no variation; one of them alone varies.
    noisy_TE = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    scale_TE = torch.ones(2, 2)
    assert load_loss(noisy_TE, noisy_TE, scale_TE, top_k(noisy_TE, 1)).item() == pytest.approx(0.0, abs=1e-6)
    first = top_k(noisy_TE[:1], 1)
    assert load_loss(noisy_TE[:1], noisy_TE[:1], scale_TE[:1], first).item() > 0.5


def test_probabilities_are_those_of_redrawn_noise():
    """P(t, e) of one token, by drawing e's noise anew many times and ranking again."""
    torch.manual_seed(0)
    clean_E, scale_E = torch.randn(5), torch.rand(5) + 0.5
    noisy_E = clean_E + torch.randn(5) * scale_E
    drawn_E = torch.zeros(5)
    for expert in range(5):
        again_NE = noisy_E.repeat(200_000, 1)
        again_NE[:, expert] = clean_E[expert] + torch.randn(200_000) * scale_E[expert]
        drawn_E[expert] = (again_NE.topk(2).indices == expert).any(-1).float().mean()
    cv = drawn_E.var(unbiased=False) / drawn_E.mean() ** 2
    loss = load_loss(noisy_E[None], clean_E[None], scale_E[None], top_k(noisy_E[None], 2))
    assert loss.item() == pytest.approx(cv.item(), abs=0.01)


@pytest.mark.parametrize("k", [1, 3])
def test_padding_counts_for_nothing(k):
    torch.manual_seed(1)
    clean_TE, scale_TE = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3) + 0.1
    noisy_TE = clean_TE + torch.randn(4, 3) * scale_TE
    valid_T = torch.tensor([True, False, True, False])
    loss = load_loss(noisy_TE, clean_TE, scale_TE, top_k(noisy_TE, k, valid_T), valid_T)
    alone = load_loss(noisy_TE[valid_T], clean_TE[valid_T], scale_TE[valid_T], top_k(noisy_TE[valid_T], k))
    torch.testing.assert_close(loss, alone)
    loss.backward()
    assert clean_TE.grad.isfinite().all()
    assert not clean_TE.grad[~valid_T].any()


def test_gradients_reach_the_logits_and_the_scale_and_are_finite_without_rivals():
    torch.manual_seed(2)
    clean_TE, scale_TE = torch.randn(3, 4, requires_grad=True), (torch.rand(3, 4) + 0.1).requires_grad_()
    noisy_TE = clean_TE + torch.randn(3, 4) * scale_TE
    load_loss(noisy_TE, clean_TE, scale_TE, top_k(noisy_TE.detach(), 2)).backward(retain_graph=True)
    assert clean_TE.grad.any()
    assert scale_TE.grad.any()
    for mask_TE in (torch.ones(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool)):
        clean_TE.grad = scale_TE.grad = None
        loss = load_loss(noisy_TE, clean_TE, scale_TE, Assignment.from_mask(mask_TE, torch.ones(3, 4)))
        assert loss.item() == 0  # all experts alike: each surely chosen, or surely not
        loss.backward(retain_graph=True)
        assert clean_TE.grad.isfinite().all()
        assert scale_TE.grad.isfinite().all()
