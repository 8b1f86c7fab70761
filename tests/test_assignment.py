"""`Assignment`: order, offsets, and the round trips between its forms."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.assignment import Assignment


@st.composite
def masks(draw):
    """A boolean (T, E) mask, empty ones included."""
    tokens, experts = draw(st.integers(0, 6)), draw(st.integers(1, 5))
    bits = draw(st.lists(st.booleans(), min_size=tokens * experts, max_size=tokens * experts))
    return torch.tensor(bits, dtype=torch.bool).reshape(tokens, experts)


def by_hand() -> Assignment:
    """Token 0 chose expert 2, token 1 nobody, token 2 experts 0 and 2."""
    return Assignment.from_pairs(
        torch.tensor([0, 2, 2]), torch.tensor([2, 0, 2]), torch.tensor([0.5, 0.1, 0.3]), num_tokens=3, num_experts=4
    )


def test_pairs_are_sorted_by_expert_and_then_token():
    assignment = by_hand()
    assert assignment.expert_P.tolist() == [0, 2, 2]
    assert assignment.token_P.tolist() == [2, 0, 2]
    assert assignment.offsets_E1.tolist() == [0, 1, 1, 3, 3]
    torch.testing.assert_close(assignment.weight_P, torch.tensor([0.1, 0.5, 0.3]))


def test_statistics_by_hand():
    assignment = by_hand()
    assert (assignment.num_experts, assignment.num_pairs) == (4, 3)
    assert assignment.load_E().tolist() == [1, 0, 2, 0]
    assert assignment.experts_per_token_T().tolist() == [1, 0, 2]
    torch.testing.assert_close(assignment.weight_sum_T(), torch.tensor([0.5, 0.0, 0.4]))
    assert assignment.top_expert_T().tolist() == [2, -1, 2]


def test_renormalised_weights_sum_to_one_where_anyone_was_chosen():
    renormalized = by_hand().renormalized()
    torch.testing.assert_close(renormalized.weight_P, torch.tensor([0.25, 1.0, 0.75]))
    torch.testing.assert_close(renormalized.weight_sum_T(), torch.tensor([1.0, 0.0, 1.0]))


def test_topk_form_equals_mask_form():
    index_TK = torch.tensor([[3, 0], [1, 2]])
    weight_TK = torch.tensor([[0.4, 0.3], [0.2, 0.1]])
    rectangular = Assignment.from_topk(index_TK, weight_TK, 4)
    weight_TE = torch.zeros(2, 4).scatter(1, index_TK, weight_TK)
    ragged = Assignment.from_mask(weight_TE > 0, weight_TE)
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1"):
        assert torch.equal(getattr(rectangular, name), getattr(ragged, name)), name


def test_many_experts_do_not_overflow_the_narrow_sort_key():
    expert_P = torch.tensor([40_000, 3, 32_767])
    assignment = Assignment.from_pairs(torch.arange(3), expert_P, torch.ones(3), 3, 40_001)
    assert assignment.expert_P.tolist() == [3, 32_767, 40_000]
    assert assignment.load_E()[[3, 32_767, 40_000]].tolist() == [1, 1, 1]
    at_limit = Assignment.from_pairs(torch.arange(2), torch.tensor([32_766, 0]), torch.ones(2), 2, 2**15 - 1)
    assert at_limit.offsets_E1[-1] == 2
    at_edge = Assignment.from_pairs(torch.arange(2), torch.tensor([32_767, 0]), torch.ones(2), 2, 2**15)
    assert at_edge.offsets_E1[-1] == 2


def test_gradients_flow_through_the_weights_alone():
    weight_TE = torch.rand(3, 2, requires_grad=True)
    mask_TE = torch.tensor([[True, False], [False, False], [True, True]])
    assignment = Assignment.from_mask(mask_TE, weight_TE)
    assignment.weight_sum_T().sum().backward()
    assert torch.equal(weight_TE.grad, mask_TE.float())


@settings(deadline=None, max_examples=60, derandomize=True)
@given(masks())
def test_mask_round_trip_and_order(mask_TE):
    weight_TE = torch.rand(mask_TE.shape)
    assignment = Assignment.from_mask(mask_TE, weight_TE)
    assert torch.equal(assignment.to_mask(), mask_TE)
    assert torch.equal(assignment.to_dense(), weight_TE * mask_TE)
    assert assignment.num_pairs == mask_TE.sum() == assignment.offsets_E1[-1]
    key_P = assignment.expert_P * max(mask_TE.shape[0], 1) + assignment.token_P
    assert bool((key_P.diff() > 0).all())
    token_P, expert_P = mask_TE.nonzero(as_tuple=True)
    again = Assignment.from_pairs(token_P, expert_P, weight_TE[token_P, expert_P], *mask_TE.shape)
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1"):
        assert torch.equal(getattr(again, name), getattr(assignment, name)), name
