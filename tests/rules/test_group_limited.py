"""Group-limited choice: by hand, and against transformers' DeepSeek-V3 router with all its parts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from crossways.errors import UserError
from crossways.gates import LinearGate
from crossways.router import Router
from crossways.rules.score import Sigmoid
from crossways.rules.select import GroupLimited, TopK


def chosen(rule, scores_E, allowed_E=None):
    scores_BSE = torch.tensor(scores_E)[None, None]
    allowed_BSE = None if allowed_E is None else torch.tensor(allowed_E)[None, None]
    return rule(scores_BSE, scores_BSE, allowed_BSE).expert_P.tolist()


def test_by_hand():
    # groups (0.9, 0.1), (0.5, 0.6), (0.7, 0.0): sums 1.0, 1.1, 0.7; maxima 0.9, 0.6, 0.7
    scores_E = [0.9, 0.1, 0.5, 0.6, 0.7, 0.0]
    assert chosen(GroupLimited(2, 3, 1), scores_E) == [2, 3]
    assert chosen(GroupLimited(2, 3, 1, "max"), scores_E) == [0, 1]
    assert chosen(GroupLimited(2, 3, 2), scores_E) == [0, 3]
    assert chosen(GroupLimited(2, 3, 2, "max"), scores_E) == [0, 4]
    assert chosen(GroupLimited(2, 3, 3), scores_E) == [0, 4]  # all groups: plain top-k


def test_a_disabled_expert_does_not_rule_out_its_group():
    # group sums without expert 1: 0.9 (its only one left), 1.1
    assert chosen(GroupLimited(1, 2, 1), [0.9, 0.8, 0.5, 0.35], [True, False, True, True]) == [0]
    assert chosen(GroupLimited(2, 2, 1), [0.9, 0.8, 0.5, 0.35], [False, False, True, True]) == [2, 3]
    assert chosen(GroupLimited(2, 2, 1), [0.9, 0.8, 0.5, 0.35], [False] * 4) == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("n_group", "topk_group", "k"), [(4, 2, 3), (2, 1, 4), (1, 1, 2), (4, 4, 8)])
def test_against_transformers_deepseek_v3(seed, n_group, topk_group, k):
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        hidden_size=8,
        n_routed_experts=8,
        num_experts_per_tok=k,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    theirs = DeepseekV3TopkRouter(config)
    theirs.weight.data.normal_()
    theirs.e_score_correction_bias.normal_(std=0.5)  # some biased scores are negative
    x_BSD = torch.randn(2, 30, 8)
    logits_TE, weight_TK, index_TK = theirs(x_BSD)
    gate = LinearGate(8, 8)
    gate.weight.data = theirs.weight.data.clone()
    select = GroupLimited(k, n_group, topk_group)
    router = Router(8, Sigmoid(), select, renormalize=True, weight_scale=2.5, bias_update_rate=0.001, gate=gate)
    router.bias.copy_(theirs.e_score_correction_bias)
    routing = router(x_BSD)
    torch.testing.assert_close(routing.logits_TE, logits_TE)
    expected_TE = torch.zeros(60, 8).scatter(1, index_TK, weight_TK)
    assert torch.equal(routing.assignment.to_mask(), expected_TE > 0)
    torch.testing.assert_close(routing.assignment.to_dense(), expected_TE)


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(2, 3), st.booleans(), st.sampled_from(["top2", "max", "top"])
)
def test_experts_come_from_few_groups_and_are_the_best_there(groups, sequence, size, ties, group_score):
    experts, topk_group = groups * size, 1 + int(torch.randint(groups, ()))
    k = 1 + int(torch.randint(topk_group * size, ()))
    scores_BSE = torch.full((2, sequence, experts), 0.5) if ties else torch.rand(2, sequence, experts)
    rule = GroupLimited(k, groups, topk_group, group_score)
    rule.check(experts)
    mask_TE = rule(scores_BSE, scores_BSE).to_mask()
    assert torch.equal(mask_TE.sum(-1), torch.full((2 * sequence,), k))
    assert (mask_TE.view(-1, groups, size).any(-1).sum(-1) <= topk_group).all()
    if topk_group == groups and not ties:
        assert torch.equal(mask_TE, TopK(k)(scores_BSE, scores_BSE).to_mask())


def test_groups_ranked_by_as_many_as_a_token_takes():
    # groups of three; k = 3 from one group: sums of three are 1.2 and 1.4, of two 1.1 and 1.0, bests 0.6 and 0.5
    scores_BSE = torch.tensor([[[0.6, 0.5, 0.1, 0.5, 0.5, 0.4]]])
    chosen = {
        name: GroupLimited(3, 2, 1, name)(scores_BSE, scores_BSE).expert_P.tolist() for name in ("top", "top2", "max")
    }
    assert chosen == {"top": [3, 4, 5], "top2": [0, 1, 2], "max": [0, 1, 2]}
    assert [GroupLimited(k, 4, 2, "top").best_of_group for k in (1, 2, 4, 5, 6)] == [1, 1, 2, 2, 3]
    with pytest.raises(UserError, match="groups of 1 have no 2 best"):
        GroupLimited(2, 4, 2, "top2").check(4)
