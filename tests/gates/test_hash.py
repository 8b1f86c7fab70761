"""The hash gate: fixed, distinct, equally weighted experts per token id."""

from __future__ import annotations

import pytest
import torch

from crossways.errors import UserError
from crossways.gates import Hash, HashGate
from crossways.perturb import DisableTop, perturbed
from crossways.router import Router
from crossways.routing import Context
from crossways.rules.score import Sigmoid, Softmax, Unified
from crossways.rules.select import TopC, TopK


def route(gate, ids_BS, k, score=None, **fields):
    router = Router(gate.num_experts, score or Softmax(), TopK(k), gate=gate, **fields)
    return router(torch.randn(*ids_BS.shape, 3), Context(token_ids_BS=ids_BS))


def test_the_table_decides_and_weights_are_exactly_equal():
    gate = HashGate(3, 4, 2)
    gate.table_VK.copy_(torch.tensor([[0, 2], [3, 1], [2, 3]]))
    routing = route(gate, torch.tensor([[1, 0, 1, 2]]), 2)
    half = 0.5
    assert routing.assignment.to_dense().tolist() == [
        [0, half, 0, half],
        [half, 0, half, 0],
        [0, half, 0, half],
        [0, 0, half, half],
    ]


@pytest.mark.parametrize("score", [Softmax(), Sigmoid(), Unified()], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_every_score_chooses_the_named_experts(score, k):
    gate, ids_BS = HashGate(50, 4, k), torch.arange(50)[None]
    assignment = route(gate, ids_BS, k, score).assignment
    named_TE = torch.zeros(50, 4, dtype=torch.bool).scatter(1, gate.table_VK, True)
    assert torch.equal(assignment.to_mask(), named_TE)
    assert assignment.weight_P.unique().numel() == 1
    torch.testing.assert_close(
        route(gate, ids_BS, k, renormalize=True).assignment.weight_P, torch.full((50 * k,), 1 / k)
    )


def test_named_experts_are_distinct_and_all_used():
    gate = HashGate(1000, 8, 2)
    assert (gate.table_VK[:, 0] != gate.table_VK[:, 1]).all()
    load_E = gate.table_VK.flatten().bincount(minlength=8)
    assert load_E.min() > 200  # 250 each in the mean
    assert load_E.max() < 300


def test_the_table_is_saved_and_has_no_parameters():
    gate = HashGate(9, 4, 2)
    assert list(gate.state_dict()) == ["table_VK"]
    assert not list(gate.parameters())
    assert gate.to(torch.bfloat16).table_VK.dtype == torch.long


def test_balanced_hash_by_hand():
    gate = HashGate(4, 2, 1)
    gate.balance(torch.tensor([3, 8, 1, 4]))  # 8 to the first, 4 and 3 and 1 to the second
    assert gate.table_VK.tolist() == [[1], [0], [1], [1]]


def test_balanced_hash_balances_what_random_does_not():
    counts_V = 1000 / torch.arange(1, 101)  # Zipf
    gate = HashGate(100, 4, 2)

    def spread():
        load_E = torch.zeros(4).index_add(0, gate.table_VK.flatten(), counts_V.repeat_interleave(2))
        return (load_E.max() / load_E.mean()).item()

    drawn = spread()
    gate.balance(counts_V)
    assert spread() < 1.01 < drawn
    assert (gate.table_VK[:, 0] != gate.table_VK[:, 1]).all()
    with pytest.raises(ValueError, match="100 ids, got 3 counts"):
        gate.balance(torch.ones(3))


def test_ids_never_seen_are_spread():
    gate = HashGate(100, 4, 1)
    gate.balance(torch.zeros(100))
    assert gate.table_VK.flatten().bincount().tolist() == [25] * 4


def test_with_all_named_experts_disabled_others_take_over():
    gate, ids_BS = HashGate(20, 4, 1), torch.arange(20)[None]
    router = Router(4, Softmax(), TopK(1), gate=gate)
    with perturbed(router, DisableTop(renormalize=True)):
        assignment = router(torch.randn(1, 20, 3), Context(token_ids_BS=ids_BS)).assignment
    assert not (assignment.top_expert_T() == gate.table_VK[:, 0]).any()
    torch.testing.assert_close(assignment.weight_P, torch.ones(20))


def test_k_must_fit_the_experts_and_the_selection():
    with pytest.raises(UserError, match="k = 5 exceeds the number of experts, 4"):
        Hash(5).check(4)
    with pytest.raises(UserError, match="set one k"):
        Hash(2).check(4, TopK(1))
    Hash(2).check(4, TopK(2))
    Hash(2).check(4, TopC(1.0))


def test_a_balanced_gate_waits_for_the_counts():
    gate, ids_BS = Hash(1, balanced=True).build(3, 2, vocab_size=4), torch.arange(4)[None]
    assert Hash(1, balanced=True).counts_tokens
    assert not Hash(1).counts_tokens
    with pytest.raises(UserError, match="does not know the training text"):
        route(gate, ids_BS, 1)
    gate.count_tokens(torch.tensor([3, 8, 1, 4]))
    assert route(gate, ids_BS, 1).assignment.top_expert_T().tolist() == [1, 0, 1, 1]
    other = Hash(1, balanced=True).build(3, 2, vocab_size=4)
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other.table_VK, gate.table_VK)


def test_counts_do_not_touch_a_random_table():
    gate = Hash(1).build(3, 2, vocab_size=40)
    before = gate.table_VK.clone()
    gate.count_tokens(torch.arange(40))
    assert torch.equal(gate.table_VK, before)
