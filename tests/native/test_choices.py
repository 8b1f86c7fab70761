"""Choices sorted with their weights in C++ against the plain path of PyTorch."""

import pytest
import torch

from crossways.assignment import Assignment
from crossways.native import routing, why_not_native
from crossways.native.choices import sorted_choices

pytestmark = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))
FIELDS = ("token_P", "expert_P", "weight_P", "offsets_E1")


def plain(monkeypatch, index_TK, weight_TK, experts):
    with monkeypatch.context() as patch:
        patch.setattr(routing, "ready", lambda *_: False)
        return Assignment.from_topk(index_TK, weight_TK, experts)


def choices(tokens, experts, k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index_TK = torch.rand(tokens, experts, generator=generator).topk(k).indices
    return index_TK, torch.rand(tokens, k, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize(("tokens", "experts", "k"), [(0, 3, 2), (1, 64, 8), (5, 1, 1), (300, 7, 3)])
def test_as_the_plain_path(monkeypatch, tokens, experts, k, dtype):
    index_TK, weight_TK = choices(tokens, experts, k)
    weight_TK = weight_TK.to(dtype)
    found = Assignment.from_topk(index_TK, weight_TK, experts)
    expected = plain(monkeypatch, index_TK, weight_TK, experts)
    assert found.num_tokens == tokens
    for name in FIELDS:
        assert getattr(found, name).dtype == getattr(expected, name).dtype
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_any_integers_and_strides(monkeypatch):
    index_TK, weight_TK = choices(40, 9, 4)
    expected = plain(monkeypatch, index_TK, weight_TK, 9)
    turned = weight_TK.t().contiguous().t()
    for index in (index_TK.int(), index_TK.t().contiguous().t()):
        for weight in (weight_TK, turned, torch.nn.Parameter(turned)):
            found = sorted_choices(index, weight, 9)
            for tensor, name in zip(found, FIELDS, strict=True):
                assert torch.equal(tensor, getattr(expected, name))


def test_gradients_reach_the_weights():
    index_TK, weight_TK = choices(40, 9, 4)
    weight_TK.requires_grad_()
    grad_P = torch.rand(160)
    token_P, expert_P, weight_P, _ = sorted_choices(index_TK, weight_TK, 9)
    (grad_TK,) = torch.autograd.grad(weight_P, weight_TK, grad_P)
    cells_TE = torch.zeros(40, 9).index_put((token_P, expert_P), grad_P)
    assert torch.equal(grad_TK, cells_TE.gather(1, index_TK))
    with torch.no_grad():
        assert torch.equal(sorted_choices(index_TK, weight_TK, 9)[2], weight_P)


@pytest.mark.parametrize("wrong", [-1, 9])
def test_experts_that_do_not_exist_are_refused(wrong):
    index_TK, weight_TK = choices(40, 9, 4)
    index_TK[3, 2] = wrong
    with pytest.raises(ValueError, match=r"\[0, 9\), got"):
        Assignment.from_topk(index_TK, weight_TK, 9)


@pytest.mark.parametrize("wanted", [False, True], ids=["no gradients", "gradients"])
def test_places_may_be_empty(wanted):
    index_TK, weight_TK = choices(40, 9, 4)
    weight_TK.requires_grad_(wanted)
    token_P, expert_P, weight_P, offsets_E1 = sorted_choices(index_TK, weight_TK, 5, empty=True)
    kept_TK = index_TK < 5
    cells_TE = torch.zeros(40, 5).index_put((token_P, expert_P), weight_P.detach())
    assert offsets_E1[-1] == len(token_P) == len(expert_P) == kept_TK.sum()
    assert torch.equal(cells_TE.gather(1, index_TK.clamp(max=4))[kept_TK], weight_TK[kept_TK])
    index_TK[0, 0] = -1
    with pytest.raises(ValueError, match="negative, got -1"):
        sorted_choices(index_TK, weight_TK, 5, empty=True)
