"""Capacity: Switch and GShard by hand, against transformers' Switch router, and random second experts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

from crossways.errors import UserError
from crossways.gates import LinearGate
from crossways.router import Router
from crossways.rules.score import Softmax
from crossways.rules.select import Capacity, TopK

# Four tokens of one row, two experts; first choices are 0, 0, 1, 0.
PROBS_BSE = torch.tensor([[[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]])


def pairs(rule, scores_BSE, valid_BS=None):
    allowed_BSE = None if valid_BS is None else valid_BS[..., None].expand_as(scores_BSE)
    assignment = rule(scores_BSE, scores_BSE, allowed_BSE)
    return set(zip(assignment.token_P.tolist(), assignment.expert_P.tolist(), strict=True))


def test_switch_by_hand():
    # C = ceil(1 * 1 * 4 / 2) = 2: expert 0 serves tokens 0 and 1 and drops token 3
    assert pairs(Capacity(1, 1.0), PROBS_BSE) == {(0, 0), (1, 0), (2, 1)}
    # C = ceil(1.25 * 4 / 2) = 3: nobody is dropped
    assert pairs(Capacity(1, 1.25), PROBS_BSE) == {(0, 0), (1, 0), (2, 1), (3, 0)}
    # C = ceil(0.25 * 4 / 2) = 1
    assert pairs(Capacity(1, 0.25), PROBS_BSE) == {(0, 0), (2, 1)}


def test_a_prefix_has_less_capacity():
    # of three tokens C = ceil(0.5 * 3 / 2) = 1 and token 1 is dropped; of four still 1, of five 2 and it is served
    assert pairs(Capacity(1, 0.5), PROBS_BSE[:, :3]) == {(0, 0), (2, 1)}
    longer_BSE = torch.cat([PROBS_BSE, PROBS_BSE[:, :1]], dim=1)
    assert (1, 0) in pairs(Capacity(1, 0.5), longer_BSE)


def test_gshard_serves_first_choices_first():
    # k = 2, C = ceil(0.75 * 2 * 4 / 2) = 3. Expert 0: first choices of 0, 1, 3 fill it, token 2's second is dropped.
    # Expert 1: first choice of token 2, then the second choices of 0 and 1; token 3's is dropped.
    served = {(0, 0), (1, 0), (3, 0), (2, 1), (0, 1), (1, 1)}
    assert pairs(Capacity(2, 0.75), PROBS_BSE) == served
    # By score: expert 0 keeps 0.9, 0.8, 0.6; expert 1 keeps 0.7, 0.4, 0.2.
    assert pairs(Capacity(2, 0.75, order="score"), PROBS_BSE) == {(0, 0), (1, 0), (3, 0), (2, 1), (3, 1), (1, 1)}


def test_megatrons_policies_by_hand():
    # k = 2, C = 3 as above. By token: all four ask both experts, so each serves the first three.
    first_three = {(t, e) for t in range(3) for e in range(2)}
    assert pairs(Capacity(2, 0.75, order="token"), PROBS_BSE) == first_three
    # By weight: these scores order tokens otherwise than the weights that they are normalised to.
    scores_BSE = torch.tensor([[[0.9, 0.8, 0.0], [0.6, 0.1, 0.0], [0.5, 0.0, 0.4]]])
    # C = ceil(0.5 * 2 * 3 / 3) = 1. Weights at expert 0 are 9/17, 6/7, 5/9: token 1 is served, by score token 0.
    by = {order: pairs(Capacity(2, 0.5, order=order, normalize=True), scores_BSE) for order in ("score", "weight")}
    assert by == {"score": {(0, 0), (0, 1), (2, 2)}, "weight": {(1, 0), (0, 1), (2, 2)}}


def test_what_was_asked_for_is_everybodys_choice():
    assert Capacity(2, 0.75, order="score").asking() == Capacity(2, None, order="score")
    assert Capacity(2, None).asking() is None
    sampling = Capacity(2, 0.75, second="random").in_training()
    assert sampling.asking()(PROBS_BSE, PROBS_BSE).num_pairs == 8


def test_groups_by_hand():
    rows_BSE = PROBS_BSE.repeat(2, 1, 1)
    assert len(pairs(Capacity(1, 1.0), rows_BSE)) == 6
    # batch: C = 4; expert 0 is asked by 0, 1, 3, 4, 5, 7 and drops the last two
    assert pairs(Capacity(1, 1.0, "batch"), rows_BSE) == {(0, 0), (1, 0), (3, 0), (4, 0), (2, 1), (6, 1)}


def test_padding_has_no_place_and_lends_none():
    valid_BS = torch.tensor([[False, True, True, True]])
    # n = 3: C = ceil(3 / 2) = 2; expert 0 serves tokens 1 and 3
    assert pairs(Capacity(1, 1.0), PROBS_BSE, valid_BS) == {(1, 0), (2, 1), (3, 0)}


def test_capacity_is_exact_in_large_groups():
    tokens_G = torch.tensor([0, 1, 2**24 + 1])
    assert Capacity(1, 1.1).capacity(tokens_G, 3)[:, 0].tolist() == [0, 1, -(-11 * (2**24 + 1) // 30)]


def test_places_of_moe_plus_plus_by_hand():
    # k n = 2 * 12 choices, gamma = 1.1, tau = 3/4, 4 feed-forward experts and 2 others: tau N_F + N_Z = 5, so
    # 1.1 * 24 / 5 = 5.28 places for the others and 3.96 for feed-forward ones, rounded up
    rule = Capacity(2, 1.1, zero_computation=2, tau=0.75)
    assert rule.capacity(torch.tensor([12]), 6).tolist() == [[4, 4, 4, 4, 6, 6]]
    assert Capacity(2, 1.1, tau=0.75).capacity(torch.tensor([12]), 6).tolist() == [[5] * 6]  # all alike: tau cancels
    with pytest.raises(UserError, match="zero_computation = 3 exceeds the 2 experts"):
        Capacity(1, zero_computation=3).check(2)


def test_a_cheap_expert_serves_more_than_a_dear_one():
    # one choice each, C = 4 / (1/2 + 1) = 8/3, so 3 places at the second expert, 4/3 so 2 at the first
    rule = Capacity(1, 1.0, zero_computation=1, tau=0.5)
    dear_BSE, cheap_BSE = PROBS_BSE[:, [0] * 4], PROBS_BSE[:, [2] * 4]
    assert pairs(rule, dear_BSE) == {(0, 0), (1, 0)}
    assert pairs(rule, cheap_BSE) == {(0, 1), (1, 1), (2, 1)}
    assert rule.decode_twin().capacity(torch.tensor([4]), 2).tolist() == [[4, 4]]


def test_weights_may_be_normalised_before_dropping():
    weights_TE = Capacity(2, 0.75, normalize=True)(PROBS_BSE[..., :2] / 2, PROBS_BSE / 2).to_dense()
    # halved scores sum to 1/2 a token; normalised they are the probabilities again, and a dropped one leaves the rest
    torch.testing.assert_close(weights_TE[3], torch.tensor([0.6, 0.0]))
    torch.testing.assert_close(weights_TE[0], torch.tensor([0.9, 0.1]))
    raw_TE = Capacity(2, 0.75)(PROBS_BSE / 2, PROBS_BSE / 2).to_dense()
    torch.testing.assert_close(raw_TE[3], torch.tensor([0.3, 0.0]))


@pytest.mark.parametrize("capacity", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_against_transformers_switch(capacity, seed):
    torch.manual_seed(seed)
    theirs = SwitchTransformersTop1Router(
        SwitchTransformersConfig(num_experts=4, expert_capacity=capacity, hidden_size=8, router_jitter_noise=0.0)
    )
    x_BSD = torch.randn(3, 8, 8)
    dispatch_BSE, prob_BS1, logits_BSE = theirs(x_BSD)
    if prob_BS1.dim() == 4:  # transformers 5.17: the choice in the second place, counted over a dimension of size one
        pytest.skip("this version of transformers never drops anybody")
    gate = LinearGate(8, 4)
    gate.weight.data = theirs.classifier.weight.data.float()
    routing = Router(4, Softmax(), Capacity(1, capacity * 4 / 8), gate=gate)(x_BSD)  # C = factor * 8 / 4
    torch.testing.assert_close(routing.logits_TE, logits_BSE.flatten(0, 1).float())
    assert torch.equal(routing.assignment.to_mask(), dispatch_BSE.flatten(0, 1).bool())
    torch.testing.assert_close(routing.assignment.to_dense(), (dispatch_BSE * prob_BS1).flatten(0, 1).float())


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_twin_is_top_k(k):
    scores_BSE = torch.randn(3, 5, 4).softmax(-1)
    for rule in (Capacity(k), Capacity(k, 0.1, "batch", "score")):
        twin = rule.decode_twin()
        ours, theirs = twin(scores_BSE, scores_BSE), TopK(k)(scores_BSE, scores_BSE)
        assert torch.equal(ours.to_dense(), theirs.to_dense())
    sums_T = Capacity(k, normalize=True).decode_twin()(scores_BSE, scores_BSE).weight_sum_T()
    torch.testing.assert_close(sums_T, torch.ones(15))


def test_random_seconds_are_kept_in_proportion_and_only_in_training():
    torch.manual_seed(0)
    scores_BSE = torch.tensor([0.5, 0.125, 0.0, 0.0]).expand(1, 4000, 4)  # normalised: 0.8 and 0.2, so kept 2 * 0.2
    rule = Capacity(2, 4.0, second="random")
    load_E = rule.in_training()(scores_BSE, scores_BSE).load_E()
    assert load_E[0] == 4000
    assert load_E[1].item() == pytest.approx(0.4 * 4000, abs=4 * math.sqrt(4000 * 0.4 * 0.6))
    assert rule(scores_BSE, scores_BSE).load_E()[1] == 4000
    assert Capacity(2).in_training() == Capacity(2)


def test_a_first_choice_is_always_asked_for():
    scores_BSE = torch.tensor([0.001, 0.9, 0.0]).expand(1, 300, 3)
    choice_BSE = torch.tensor([5.0, 1.0, 0.0]).expand(1, 300, 3)  # as after a bias: the first choice weighs little
    assert Capacity(2, 4.0, second="random").in_training()(choice_BSE, scores_BSE).load_E().tolist() == [300, 300, 0]
    nothing_BSE = torch.zeros(1, 300, 3)
    assert Capacity(2, 4.0, second="random").in_training()(choice_BSE, nothing_BSE).load_E()[0] == 300


def test_the_router_samples_seconds_in_training_only():
    gate = LinearGate(8, 4)
    router = Router(4, Softmax(), Capacity(2, 4.0, second="random"), gate=gate)
    x_BSD = torch.randn(1, 200, 8)
    assert router.eval()(x_BSD).assignment.num_pairs == 400
    assert 200 < router.train()(x_BSD).assignment.num_pairs < 400


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.floats(0.05, 3.0),
    st.sampled_from(["sequence", "batch"]),
    st.sampled_from(["position", "score", "weight", "token"]),
    st.booleans(),
)
def test_no_expert_serves_more_than_its_capacity_and_none_is_idle_while_asked(b, s, e, factor, group, order, ties):
    k = torch.randint(1, e + 1, ()).item()
    scores_BSE = torch.full((b, s, e), 0.25) if ties else torch.randn(b, s, e).softmax(-1)
    valid_BS = torch.rand(b, s) < 0.7
    allowed_BSE = valid_BS[..., None].expand(b, s, e)
    rule = Capacity(k, factor, group, order)
    served_BSE = rule(scores_BSE, scores_BSE, allowed_BSE).to_mask().view(b, s, e)
    asked_BSE = TopK(k)(scores_BSE, scores_BSE, allowed_BSE).to_mask().view(b, s, e)
    assert not (served_BSE & ~asked_BSE).any()
    dims = (1,) if group == "sequence" else (0, 1)
    places = rule.capacity(valid_BS.sum(dims if group == "sequence" else None).reshape(-1), e)
    load = served_BSE.sum(dims).reshape(-1, e)
    wanted = asked_BSE.sum(dims).reshape(-1, e)
    assert torch.equal(load, torch.minimum(wanted, places))
