"""Selections: numbers by hand, optimality, declared properties, padding, ties and other edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import LinearConstraint, linprog, milp

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.rules.probe import Probe, check_selection, probe_selection
from crossways.rules.score import Softmax, Unified
from crossways.rules.select import (
    Base,
    Capacity,
    ExpertChoice,
    GroupLimited,
    Positive,
    SampledTopK,
    ScheduledTopK,
    Sinkhorn,
    Threshold,
    TopC,
    TopK,
    TopP,
    build_selection,
    selection_catalogue,
)
from crossways.rules.select.base import budgets, top_of_groups, whole

# One row of three tokens and one of two (the third is padding where a mask is given), three experts.
SCORES_BSE = torch.tensor(
    [
        [[0.90, 0.80, 0.70], [0.60, 0.15, 0.10], [0.50, 0.40, 0.05]],
        [[0.30, 0.20, 0.12], [0.95, 0.11, 0.01], [0.99, 0.98, 0.97]],
    ]
)
VALID_BS = torch.tensor([[True, True, True], [True, True, False]])

RULES = [
    TopK(1),
    TopK(2),
    *(TopC(k, group) for k in (0.5, 1.5) for group in ("sequence", "batch", "position")),
    *(ExpertChoice(1.5, group) for group in ("sequence", "batch")),
    ScheduledTopK(k=2, k_end=4, steps=10),
    Threshold(value=0.3),
    Threshold(value=torch.tensor([0.1, 0.2, 0.3, 0.4])),
    TopP(0.4),
    TopP(0.9, cap=2),
    TopP(0.9, cap=1),
    Positive(),
    GroupLimited(2, n_group=2, topk_group=1),
    GroupLimited(1, n_group=4, topk_group=2, group_score="max"),
    Capacity(),
    Capacity(factor=1.0, group="batch"),
    *(Capacity(2, 0.6, group, order) for group in ("sequence", "batch") for order in ("position", "score")),
    Capacity(2, 1.0, normalize=True, second="random"),
    Capacity(2, None),
    Capacity(2, 0.6, zero_computation=2, tau=0.5),
    *(Capacity(2, 0.6, group, order) for group in ("sequence", "batch") for order in ("weight", "token")),
    SampledTopK(2),
    *(Sinkhorn(k, group) for k in (1, 2) for group in ("sequence", "batch")),
    *(Base(group) for group in ("sequence", "batch")),
]


def pairs(rule, scores_BSE=SCORES_BSE, valid_BS=VALID_BS):
    """The chosen (row, position, expert) triples."""
    allowed_BSE = None if valid_BS is None else valid_BS[..., None].expand_as(scores_BSE)
    assignment = rule(scores_BSE, scores_BSE, allowed_BSE)
    sequence = scores_BSE.shape[1]
    found = zip(assignment.token_P.tolist(), assignment.expert_P.tolist(), strict=True)
    return {(t // sequence, t % sequence, e) for t, e in found}


def test_top_k_by_hand():
    assert pairs(TopK(1)) == {(0, 0, 0), (0, 1, 0), (0, 2, 0), (1, 0, 0), (1, 1, 0)}
    assert pairs(TopK(2)) == pairs(TopK(1)) | {(0, 0, 1), (0, 1, 1), (0, 2, 1), (1, 0, 1), (1, 1, 1)}


def test_a_scheduled_k_by_hand():
    rising, falling = ScheduledTopK(k=1, k_end=4, steps=6), ScheduledTopK(k=3, k_end=1, steps=2)
    assert [rising.at_step(step).k for step in range(9)] == [1, 2, 2, 2, 3, 4, 4, 4, 4]  # 1.5 and 2.5 to the even
    assert [falling.at_step(step).k for step in range(4)] == [3, 2, 1, 1]
    assert pairs(rising) == pairs(TopK(1))
    assert TopK(2).at_step(100) == TopK(2)


def test_top_c_over_a_sequence_by_hand():
    # k = 1: 3 pairs of row 0, 2 of row 1; token (0, 0) takes all three, (0, 1) and (0, 2) get nobody
    assert pairs(TopC(1.0)) == {(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 1, 0), (1, 0, 0)}
    # k = 0.5: round(1.5) = 2 and round(1.0) = 1
    assert pairs(TopC(0.5)) == {(0, 0, 0), (0, 0, 1), (1, 1, 0)}
    # k = 1.5: round(4.5) = 5 and round(3.0) = 3
    assert pairs(TopC(1.5)) == pairs(TopC(1.0)) | {(0, 1, 0), (0, 2, 0), (1, 0, 1)}


def test_top_c_over_a_batch_by_hand():
    # k = 0.8: 4 of 5 tokens' pairs, wherever they are
    assert pairs(TopC(0.8, "batch")) == {(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 1, 0)}


def test_top_c_over_positions_by_hand():
    # k = 1: two pairs at positions 0 and 1, one at position 2, where row 1 is padding
    assert pairs(TopC(1.0, "position")) == {(0, 0, 0), (0, 0, 1), (1, 1, 0), (0, 1, 0), (0, 2, 0)}
    # k = 0.6: round(1.2) = 1, 1 and round(0.6) = 1
    assert pairs(TopC(0.6, "position")) == {(0, 0, 0), (1, 1, 0), (0, 2, 0)}


def test_expert_choice_by_hand():
    # k = 1: each expert takes 3/3 = 1 token of row 0 and round(2/3) = 1 of row 1
    assert pairs(ExpertChoice(1.0)) == {(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 1, 0), (1, 0, 1), (1, 0, 2)}
    # the batch as one group: round(5/3) = 2 tokens each
    assert pairs(ExpertChoice(1.0, "batch")) == {(1, 1, 0), (0, 0, 0), (0, 0, 1), (0, 2, 1), (0, 0, 2), (1, 0, 2)}


def test_threshold_by_hand():
    assert pairs(Threshold(value=0.6)) == {(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (1, 1, 0)}
    per_expert = Threshold(value=torch.tensor([0.95, 0.4, 2.0]))
    assert pairs(per_expert) == {(1, 1, 0), (0, 0, 1), (0, 2, 1)}


def test_weights_are_the_scores_and_choice_may_differ():
    choice_BSE = torch.tensor([[[0.0, 1.0, 2.0]]])
    scores_BSE = torch.tensor([[[0.5, 0.3, 0.2]]])
    for rule in (TopK(1), TopC(1.0), Threshold(value=1.5)):
        assignment = rule(choice_BSE, scores_BSE)
        assert assignment.expert_P.tolist() == [2]
        assert assignment.weight_P.tolist() == pytest.approx([0.2])


def test_disabled_experts_are_never_chosen():
    allowed_BSE = torch.ones_like(SCORES_BSE, dtype=torch.bool)
    allowed_BSE[..., 0] = False
    for rule in (TopK(2), TopK(3), TopC(1.5), ExpertChoice(1.5), Threshold(value=0.0)):
        assignment = rule(SCORES_BSE, SCORES_BSE, allowed_BSE)
        assert assignment.load_E()[0] == 0
        assert assignment.num_pairs > 0


def test_budgets_are_exact_in_large_groups():
    tokens_G = torch.tensor([0, 1, 2150, 2**24 + 1])
    assert budgets(tokens_G, 7.49).tolist() == [0, 7, 16104, (749 * (2**24 + 1) + 50) // 100]  # float32 gives 16103
    assert budgets(torch.tensor([5, 15]), 0.1).tolist() == [1, 2]  # a half rounds up, also where 0.1 is not exact
    assert budgets(torch.tensor([1, 4, 5]), 1.5, experts=4).tolist() == [0, 2, 2]  # 0.375, 1.5, 1.875


@pytest.mark.parametrize("seed", range(6))
def test_top_c_is_the_optimum_of_the_linear_program(seed):
    generator = torch.Generator().manual_seed(seed)
    scores_BSE = torch.randn(1, 7, 4, generator=generator).softmax(-1)
    k = [0.4, 0.9, 1.0, 1.7, 2.3, 4.0][seed]
    value = TopC(k)(scores_BSE, scores_BSE).weight_P.double().sum().item()
    gain = -scores_BSE.flatten().double().numpy()
    budget = np.ones((1, gain.size)), [whole(k * 7)]
    relaxed = linprog(gain, A_ub=budget[0], b_ub=budget[1], bounds=(0, 1))
    integral = milp(
        gain, constraints=LinearConstraint(budget[0], ub=budget[1]), integrality=np.ones(28), bounds=(0, 1)
    )
    assert value == pytest.approx(-relaxed.fun, abs=1e-6)
    assert value == pytest.approx(-integral.fun, abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_expert_choice_is_the_optimum_with_a_budget_per_expert(seed):
    generator = torch.Generator().manual_seed(seed)
    tokens, experts, k = 8, 4, [0.5, 1.0, 1.5, 3.0][seed]
    scores_BSE = torch.randn(1, tokens, experts, generator=generator).softmax(-1)
    chosen = ExpertChoice(k)(scores_BSE, scores_BSE)
    capacity = whole(k * tokens / experts)
    per_expert = np.tile(np.eye(experts), tokens)  # columns: variables in row-major (T, E)
    per_token = np.kron(np.eye(tokens), np.ones(experts))
    limits = np.concatenate([np.full(experts, capacity), np.full(tokens, experts)])
    best = linprog(
        -scores_BSE.flatten().double().numpy(), A_ub=np.vstack([per_expert, per_token]), b_ub=limits, bounds=(0, 1)
    )
    assert chosen.load_E().tolist() == [capacity] * experts
    assert chosen.weight_P.double().sum().item() == pytest.approx(-best.fun, abs=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_unified_alpha_one_and_one_token_per_group_is_softmax_top_k(k):
    logits_BSE = torch.randn(5, 1, 4)
    unified_BSE = Unified(1.0)(logits_BSE)
    ours = TopC(k)(unified_BSE, unified_BSE)
    theirs = TopK(k)(Softmax()(logits_BSE), Softmax()(logits_BSE))
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_declared_properties_hold(rule):
    check_selection(rule)


def test_every_rule_of_the_catalogue_is_probed():
    assert {type(rule) for rule in RULES} == set(selection_catalogue().values())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_decode_twin_is_causal_and_batch_invariant(rule):
    twin = rule.decode_twin()
    twin = twin.at(torch.tensor([0.2])) if isinstance(twin, Threshold) and twin.value is None else twin
    observed = probe_selection(twin)
    assert observed.causal
    assert observed.batch_invariant
    if rule.causal and rule.batch_invariant:
        assert twin is rule


def test_the_probe_sees_what_the_number_of_later_tokens_does():
    class Hopeful(Capacity):
        causal = True

    with pytest.raises(ValueError, match="causal is declared True but observed False"):
        check_selection(Hopeful(1, 1.0))


def test_the_probe_finds_false_claims():
    class Careless(TopC):
        causal = True

    with pytest.raises(ValueError, match="causal is declared True but observed False"):
        check_selection(Careless(1.0))

    class PaddingCompetes(TopC):
        def __call__(self, choice_BSE, scores_BSE, allowed_BSE=None):
            return super().__call__(choice_BSE, scores_BSE)

    with pytest.raises(ValueError, match="padding_inert is declared True but observed False"):
        check_selection(PaddingCompetes(1.0), Probe(trials=10))


@pytest.mark.parametrize("rule", [TopC(1.5), ExpertChoice(1.5)], ids=str)
@pytest.mark.parametrize("sides", [(0, 9), (7, 0), (1, 30)], ids=["right", "left", "both"])
def test_padding_does_not_turn_ties(rule, sides):
    left, right = sides
    for sequence in range(2, 24):
        scores_BSE = torch.randint(1, 4, (1, sequence, 8)) / 4
        alone_TE = rule(scores_BSE, scores_BSE).to_dense()
        wide_BSE = torch.nn.functional.pad(scores_BSE, (0, 0, left, right), value=9.0)
        allowed_BSE = torch.nn.functional.pad(torch.ones_like(scores_BSE, dtype=torch.bool), (0, 0, left, right))
        wide_TE = rule(wide_BSE, wide_BSE, allowed_BSE).to_dense()
        assert torch.equal(wide_TE[left : left + sequence], alone_TE)
        assert wide_TE.count_nonzero() == alone_TE.count_nonzero()


def test_of_equal_pairs_the_first_are_taken():
    scores_BSE = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]])
    expected_TE = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.0, 0.5]])
    assert torch.equal(TopC(1.5)(scores_BSE, scores_BSE).to_dense(), expected_TE)


class Claims(TopK):
    """Says of itself whatever is safest; what it chooses differs."""

    causal = batch_invariant = True
    exact_budget = False

    def __call__(self, choice_BSE, scores_BSE, allowed_BSE=None):
        mask_BSE = self.choose(choice_BSE) & (True if allowed_BSE is None else allowed_BSE)
        experts = choice_BSE.shape[-1]
        return Assignment.from_mask(mask_BSE.reshape(-1, experts), scores_BSE.reshape(-1, experts))


class InChunksOfHalfTheProbe(Claims):
    def choose(self, choice_BSE):
        best = [part.amax((1, 2), keepdim=True).expand_as(part) for part in choice_BSE.split(3, dim=1)]
        return choice_BSE >= torch.cat(best, dim=1) - 0.3


class FirstTokenLooksAhead(Claims):
    def choose(self, choice_BSE):
        is_first_S1 = torch.arange(choice_BSE.shape[1])[:, None] == 0
        return (choice_BSE > 0.4) | (is_first_S1 & (choice_BSE > choice_BSE[:, 1:2, :1].sum()))


class FirstRowDecides(Claims):
    def choose(self, choice_BSE):
        return torch.cat([choice_BSE[:1] > 0.3, choice_BSE[1:] > choice_BSE[:1, :1, :1]])


class CountsPaddingOnTheLeft(Claims):
    def choose(self, choice_BSE):
        is_early_S1 = torch.arange(choice_BSE.shape[1])[:, None] < 2
        return (choice_BSE > 0.4) | (is_early_S1 & (choice_BSE > 0.2))


@pytest.mark.parametrize(
    ("liar", "claim"),
    [
        (InChunksOfHalfTheProbe, "causal"),
        (FirstTokenLooksAhead, "causal"),
        (FirstRowDecides, "batch_invariant"),
        (CountsPaddingOnTheLeft, "padding_inert"),
    ],
)
def test_the_probe_finds_what_shows_in_one_place_only(liar, claim):
    with pytest.raises(ValueError, match=f"{claim} is declared True but observed False"):
        check_selection(liar(1))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_no_mask_is_the_same_as_a_full_one(rule):
    scores_BSE = torch.randn(3, 5, 4).softmax(-1)
    assert pairs(rule, scores_BSE, None) == pairs(rule, scores_BSE, torch.ones(3, 5, dtype=torch.bool))


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_padding_alone_chooses_nobody(rule):
    scores_BSE = torch.rand(2, 3, 4)
    assert pairs(rule, scores_BSE, torch.zeros(2, 3, dtype=torch.bool)) == set()
    # one empty row beside a full one
    one_row_BS = torch.tensor([[False] * 3, [True] * 3])
    assert {b for b, _, _ in pairs(rule, scores_BSE, one_row_BS)} <= {1}


@pytest.mark.parametrize("rule", [TopC(1.5), TopC(0.7, "batch"), ExpertChoice(1.5), Threshold(k=1.5)], ids=str)
def test_the_pooled_cutoff_spends_the_budget(rule):
    scores_BSE = torch.randn(4, 25, 4).softmax(-1)
    valid_BS = torch.rand(4, 25) < 0.8
    allowed_BSE = valid_BS[..., None].expand_as(scores_BSE)
    twin = rule.decode_twin().at(rule.cutoff(scores_BSE, allowed_BSE))
    spent = twin(scores_BSE, scores_BSE, allowed_BSE).num_pairs
    slack = 4 / 2 if isinstance(rule, ExpertChoice) else 0.5
    assert abs(spent - rule.k * valid_BS.sum().item()) <= slack


def test_the_cutoff_of_padding_alone_is_unknown():
    allowed_BSE = torch.zeros(1, 2, 3, dtype=torch.bool)
    assert TopC(1.0).cutoff(torch.rand(1, 2, 3), allowed_BSE).isnan().tolist() == [True]
    assert ExpertChoice(1.0).cutoff(torch.rand(1, 2, 3), allowed_BSE).isnan().tolist() == [True] * 3


@pytest.mark.parametrize(
    ("spec", "experts"),
    [
        ({"name": "top_k", "k": 5}, 4),
        ({"name": "top_k", "k": 0}, 4),
        ({"name": "top_k", "k": 1.5}, 4),
        ({"name": "top_k", "k": "two"}, 4),
        ({"name": "top_k", "k": math.nan}, 4),
        ({"name": "top_c", "k": 4.1}, 4),
        ({"name": "top_c", "k": 0}, 4),
        ({"name": "top_c", "k": math.nan}, 4),
        ({"name": "top_c", "k": "1"}, 4),
        ({"name": "top_c", "k": 1, "group": "sentence"}, 4),
        ({"name": "expert_choice", "k": -1}, 4),
        ({"name": "expert_choice", "k": 1, "group": "position"}, 4),
        ({"name": "scheduled_top_k", "k": 1, "k_end": 5, "steps": 9}, 4),
        ({"name": "scheduled_top_k", "k": 5, "k_end": 4, "steps": 9}, 4),
        ({"name": "scheduled_top_k", "k": 1, "k_end": 2, "steps": 0}, 4),
        ({"name": "scheduled_top_k", "k": 1, "k_end": 1.5, "steps": 9}, 4),
        ({"name": "scheduled_top_k", "k": 1, "k_end": 2}, 4),
        ({"name": "threshold", "k": 9}, 4),
        ({"name": "threshold", "value": "high"}, 4),
        ({"name": "threshold", "value": math.nan}, 4),
        ({"name": "top_p", "p": 0}, 4),
        ({"name": "top_p", "p": 1.01}, 4),
        ({"name": "top_p", "p": math.nan}, 4),
        ({"name": "top_p", "p": 0.4, "cap": 0}, 4),
        ({"name": "top_p", "p": 0.4, "cap": 5}, 4),
        ({"name": "top_p"}, 4),
        ({"name": "group_limited", "k": 2, "n_group": 3}, 4),
        ({"name": "group_limited", "k": 2, "n_group": 4, "topk_group": 2}, 4),  # groups of one have no two best
        ({"name": "group_limited", "k": 3, "n_group": 2, "topk_group": 1}, 4),
        ({"name": "group_limited", "k": 2, "n_group": 2, "topk_group": 3}, 4),
        ({"name": "group_limited", "k": 2, "n_group": 2, "topk_group": 1, "group_score": "mean"}, 4),
        ({"name": "capacity", "k": 5}, 4),
        ({"name": "capacity", "k": 0.5}, 4),
        ({"name": "capacity", "factor": 0}, 4),
        ({"name": "capacity", "factor": math.inf}, 4),
        ({"name": "capacity", "factor": math.nan}, 4),
        ({"name": "capacity", "order": "random"}, 4),
        ({"name": "capacity", "group": "position"}, 4),
        ({"name": "capacity", "second": "never"}, 4),
        ({"name": "sinkhorn", "k": 9}, 4),
        ({"name": "sinkhorn", "tolerance": 0}, 4),
        ({"name": "sinkhorn", "max_iterations": 0}, 4),
        ({"name": "sinkhorn", "group": "position"}, 4),
        ({"name": "base", "group": "position"}, 4),
        ({"name": "base", "k": 2}, 4),
        ({"name": "positive", "k": 2}, 4),
        ({"name": "topk", "k": 1}, 4),
        ({"name": "top_k"}, 4),
        ({"k": 2}, 4),
        (7, 4),
    ],
    ids=str,
)
def test_impossible_selections_are_refused(spec, experts):
    with pytest.raises(UserError):
        build_selection(spec).check(experts)


def test_a_whole_float_is_a_whole_number():
    assert pairs(build_selection({"name": "top_k", "k": 2.0})) == pairs(TopK(2))


def test_a_threshold_without_cutoff_says_so():
    with pytest.raises(UserError, match="no cutoff"):
        Threshold()(SCORES_BSE, SCORES_BSE)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_broken_score_shows_in_the_weights(rule):
    scores_BSE = torch.full((1, 2, 4), 0.2)
    scores_BSE[0, 1, 2] = math.nan
    allowed_BSE = torch.ones_like(scores_BSE, dtype=torch.bool)
    for mask_BSE in (None, allowed_BSE):
        assert rule(scores_BSE, scores_BSE, mask_BSE).weight_P.isnan().any()
    allowed_BSE[0, 1] = False  # but a broken score of padding does not
    assert not rule(scores_BSE, scores_BSE, allowed_BSE).weight_P.isnan().any()


@st.composite
def problems(draw):
    """Scores with ties, a ragged mask, and a whole or fractional budget up to E."""
    batch, sequence, experts = draw(st.integers(1, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    size = batch * sequence * experts
    values = draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=size, max_size=size))
    valid = draw(st.lists(st.booleans(), min_size=batch * sequence, max_size=batch * sequence))
    k = draw(st.one_of(st.integers(1, experts), st.floats(0.05, experts)))
    return torch.tensor(values).view(batch, sequence, experts), torch.tensor(valid).view(batch, sequence), k


def groups_of(rule, valid_BS):
    """Valid tokens of each group."""
    return {"sequence": valid_BS.sum(1), "batch": valid_BS.sum()[None], "position": valid_BS.sum(0)}[rule.group]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(problems(), st.sampled_from(["sequence", "batch", "position"]))
def test_top_c_spends_its_budget_exactly_on_the_best(problem, group):
    scores_BSE, valid_BS, k = problem
    rule = TopC(k, group)
    chosen = pairs(rule, scores_BSE, valid_BS)
    assert len(chosen) == sum(whole(k * n) for n in groups_of(rule, valid_BS).tolist())
    assert all(valid_BS[b, s] for b, s, _ in chosen)
    key = {"sequence": 0, "position": 1}
    for b, s, e in {(b, s, e) for b, s, e in np.ndindex(*scores_BSE.shape) if valid_BS[b, s]} - chosen:
        rivals = [c for c in chosen if group == "batch" or c[key[group]] == (b, s)[key[group]]]
        assert all(scores_BSE[c] >= scores_BSE[b, s, e] for c in rivals)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(problems(), st.sampled_from(["sequence", "batch"]))
def test_expert_choice_loads_are_equal(problem, group):
    scores_BSE, valid_BS, k = problem
    rule = ExpertChoice(k, group)
    experts = scores_BSE.shape[-1]
    chosen = pairs(rule, scores_BSE, valid_BS)
    capacity = sum(whole(n * (k / experts)) for n in groups_of(rule, valid_BS).tolist())
    assert [sum(e == expert for _, _, e in chosen) for expert in range(experts)] == [capacity] * experts
    assert all(valid_BS[b, s] for b, s, _ in chosen)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(problems())
def test_top_k_gives_every_valid_token_k_distinct_experts(problem):
    scores_BSE, valid_BS, k = problem
    k = max(int(k), 1)
    allowed_BSE = valid_BS[..., None].expand_as(scores_BSE)
    assignment = TopK(k)(scores_BSE, scores_BSE, allowed_BSE)
    assert torch.equal(assignment.experts_per_token_T(), k * valid_BS.flatten().long())
    if k == scores_BSE.shape[-1]:
        assert torch.equal(assignment.to_mask(), allowed_BSE.flatten(0, 1))


@settings(deadline=None, max_examples=80, derandomize=True)
@given(st.integers(0, 4), st.integers(1, 6), st.integers(0, 8), st.booleans())
def test_top_of_groups_takes_exactly_the_budget(groups, members, budget, masked):
    choice_GN = torch.rand(groups, members).round(decimals=1)
    allowed_GN = torch.rand(groups, members) < 0.6 if masked else None
    budget_G = torch.full((groups,), budget)
    mask_GN = top_of_groups(choice_GN, allowed_GN, budget_G, most=budget)
    room_G = torch.full((groups,), members) if allowed_GN is None else allowed_GN.sum(-1)
    assert torch.equal(mask_GN.sum(-1), torch.minimum(budget_G, room_G))
