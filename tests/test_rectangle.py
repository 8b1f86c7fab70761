"""The rectangular form of routing: there and back, by hand, with and without the C++ parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.assignment import Assignment
from crossways.native import routing, why_not_native
from crossways.rectangle import from_rectangle, to_rectangle


@pytest.fixture(params=["native", "plain"], autouse=True)
def path(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(routing, "ready", lambda *_: False)
    elif (reason := why_not_native()) is not None:
        pytest.skip(reason)
    return request.param


def by_hand():
    """Token 0 chose expert 2, token 1 nobody, token 2 experts 0 and 2, of four."""
    weight_P = torch.tensor([0.5, 0.1, 0.3], requires_grad=True)
    token_P, expert_P = torch.tensor([0, 2, 2]), torch.tensor([2, 0, 2])
    return weight_P, Assignment.from_pairs(token_P, expert_P, weight_P, num_tokens=3, num_experts=4)


def test_by_hand():
    weight_P, assignment = by_hand()
    weight_TK, index_TK = to_rectangle(assignment)
    assert index_TK.tolist() == [[2, 4], [4, 4], [0, 2]]
    torch.testing.assert_close(weight_TK, torch.tensor([[0.5, 0.0], [0.0, 0.0], [0.1, 0.3]]))
    again = from_rectangle(index_TK, 2 * weight_TK, 4)
    assert again.token_P.tolist() == [2, 0, 2]
    assert again.expert_P.tolist() == [0, 2, 2]
    assert again.offsets_E1.tolist() == [0, 1, 1, 3, 3]
    (again.weight_P * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert weight_P.grad.tolist() == [20.0, 2.0, 200.0]


def test_experts_of_other_processes_are_left_out():
    index_TK, weight_TK = torch.tensor([[7, 1], [9, 0]]), torch.tensor([[0.4, 0.3], [0.2, 0.1]])
    assignment = from_rectangle(index_TK.int(), weight_TK, 2)
    assert assignment.token_P.tolist() == [1, 0]
    assert assignment.expert_P.tolist() == [0, 1]
    torch.testing.assert_close(assignment.weight_P, torch.tensor([0.1, 0.3]))
    assert from_rectangle(index_TK + 9, weight_TK, 2).num_pairs == 0


def test_negative_experts_are_refused(path):
    if path == "plain":
        pytest.skip("indexing is not checked there")
    with pytest.raises(ValueError, match="negative"):
        from_rectangle(torch.tensor([[0, -1]]), torch.ones(1, 2), 2)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(0, 9), experts=st.integers(1, 20), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_there_and_back(tokens, experts, share, seed):
    generator = torch.Generator().manual_seed(seed)
    mask_TE = torch.rand(tokens, experts, generator=generator) < share
    assignment = Assignment.from_mask(mask_TE, torch.rand(tokens, experts, generator=generator))
    weight_TK, index_TK = to_rectangle(assignment)
    assert weight_TK.shape == index_TK.shape == (tokens, max(int(mask_TE.sum(1).max()) if tokens else 1, 1))
    again = from_rectangle(index_TK, weight_TK, experts)
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1", "num_tokens"):
        ours, theirs = getattr(again, name), getattr(assignment, name)
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs, name
