"""Forced paths and the K most frequent ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from crossways.perturb import ForcePaths, FrequentPaths, perturbed
from crossways.perturb.force import force_top
from crossways.perturb.frequent import best_paths, log_shares
from crossways.routing import Routing
from crossways.rules.select import TopC, TopK
from crossways.trace import traced


def tops(routings):
    return torch.stack([routing.assignment.top_expert_T() for routing in routings], dim=1)


def routing_of(scores_TE, select):
    assignment = select(scores_TE[None], scores_TE[None])
    return Routing(logits_TE=scores_TE.log(), scores_TE=scores_TE, assignment=assignment)


SCORES_TE = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])


def test_the_forced_expert_takes_place_and_weight_of_the_top_one_by_hand():
    forced = force_top(routing_of(SCORES_TE, TopK(2)), torch.tensor([2, 1, -1]), None, renormalize=False, alone=False)
    expected_TE = torch.tensor([[0.0, 0.3, 0.5], [0.3, 0.5, 0.0], [0.0, 0.2, 0.7]])
    torch.testing.assert_close(forced.assignment.to_dense(), expected_TE)
    assert torch.equal(forced.assignment.to_mask(), expected_TE > 0)
    assert forced.assignment.top_expert_T().tolist() == [2, 1, 2]


def test_alone_the_forced_expert_keeps_its_own_score():
    expert_T = torch.tensor([2, 1, -1])
    forced = force_top(routing_of(SCORES_TE, TopK(2)), expert_T, None, renormalize=False, alone=True)
    expected_TE = torch.tensor([[0.0, 0.0, 0.2], [0.0, 0.3, 0.0], [0.0, 0.2, 0.7]])
    torch.testing.assert_close(forced.assignment.to_dense(), expected_TE)
    scaled = force_top(routing_of(SCORES_TE, TopK(2)), expert_T, None, renormalize=True, alone=True)
    assert scaled.assignment.to_dense()[:2].sum(-1).tolist() == [1.0, 1.0]


def test_tokens_without_an_expert_get_the_forced_one_with_its_score_and_padding_nobody():
    routing = routing_of(SCORES_TE, TopC(k=1 / 3))  # one pair for three tokens: the 0.7
    allowed_BSE = torch.tensor([[[True] * 3, [False] * 3, [True] * 3]])
    forced = force_top(routing, torch.tensor([1, 1, 0]), allowed_BSE, renormalize=False, alone=False)
    expected_TE = torch.tensor([[0.0, 0.3, 0.0], [0.0, 0.0, 0.0], [0.7, 0.0, 0.0]])
    torch.testing.assert_close(forced.assignment.to_dense(), expected_TE)


@pytest.mark.parametrize(
    "fields",
    [{}, {"select": {"name": "top_k", "k": 1}}, {"layer": "cartesian"}, {"sharing": {"name": "block", "size": 2}}],
)
@pytest.mark.parametrize("alone", [False, True])
def test_the_executed_path_is_the_forced_one(tiny, ids_BS, fields, alone):
    model = tiny(**fields)
    free = model(ids_BS, output_routings=True)
    routers = len(free.routings)
    path_BSR = torch.randint(0, 4, (2, 8, routers), generator=torch.Generator().manual_seed(2))
    with perturbed(model, ForcePaths(path_BSR, alone=alone)):
        forced = model(ids_BS, output_routings=True).routings
    assert torch.equal(tops(forced), path_BSR.view(-1, routers))
    if not alone:
        assert all(
            a.assignment.num_pairs == b.assignment.num_pairs for a, b in zip(forced, free.routings, strict=True)
        )


def test_forcing_the_free_path_changes_nothing(tiny, ids_BS):
    model = tiny()
    free = model(ids_BS, output_routings=True)
    with perturbed(model, ForcePaths(tops(free.routings).view(2, 8, 3))):
        assert torch.equal(model(ids_BS).logits, free.logits)


def test_padding_is_not_forced(tiny, ids_BS):
    model = tiny()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, 5:] = 0
    with perturbed(model, ForcePaths(torch.zeros(2, 8, 3, dtype=torch.int64))):
        routings = model(ids_BS, attention_mask=mask_BS, output_routings=True).routings
    assert not routings[0].assignment.to_mask()[~mask_BS.flatten().bool()].any()


def test_paths_of_another_shape_are_refused(tiny, ids_BS):
    model = tiny()
    for wrong, message in (
        (torch.zeros(2, 8, 2, dtype=torch.int64), "2 routers given to a model with 3"),
        (torch.full((2, 8, 3), 4), "between -1 and 3"),
        (torch.zeros(2, 7, 3, dtype=torch.int64), "shape"),
    ):
        with pytest.raises(ValueError, match=message), perturbed(model, ForcePaths(wrong)):
            model(ids_BS)


def test_the_best_path_by_hand():
    first_TE = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8]]).log()
    second_TE = torch.tensor([[0.1, 0.8, 0.1], [0.5, 0.25, 0.25]]).log()
    path_NR = torch.tensor([[0, 0], [1, 1], [2, 2]])  # token 0: .06 .24 .01; token 1: .05 .025 .2
    assert best_paths([first_TE, second_TE], path_NR).tolist() == [[1, 1], [2, 2]]
    nobody_NR = torch.tensor([[0, 0], [2, -1]])  # token 0: .06 against .1 / 3; token 1: .05 against .8 / 3
    assert best_paths([first_TE, second_TE], nobody_NR).tolist() == [[0, 0], [2, -1]]


def test_best_paths_in_chunks(monkeypatch):
    log_prob_R = [torch.randn(50, 4).log_softmax(-1) for _ in range(3)]
    path_NR = torch.tensor(list(itertools.product(range(4), repeat=3)))
    whole = best_paths(log_prob_R, path_NR)
    assert torch.equal(whole, torch.stack([x.argmax(-1) for x in log_prob_R], 1))
    monkeypatch.setattr("crossways.perturb.frequent.CHUNK_ENTRIES", 100)
    assert torch.equal(best_paths(log_prob_R, path_NR), whole)


def test_shares_are_softmax_for_softmax_and_finite_for_zero():
    logits_TE = torch.randn(3, 4)
    torch.testing.assert_close(log_shares(logits_TE.softmax(-1)), logits_TE.log_softmax(-1))
    assert log_shares(torch.tensor([[0.0, 1.0]])).isfinite().all()


def test_all_paths_leave_the_model_as_it_is_and_one_path_takes_all_tokens(tiny, ids_BS):
    model = tiny(select={"name": "top_k", "k": 1})
    free = model(ids_BS, output_routings=True)
    everything = torch.tensor(list(itertools.product(range(4), repeat=3)))
    with perturbed(model, FrequentPaths(everything)):
        assert torch.equal(model(ids_BS).logits, free.logits)
    with perturbed(model, FrequentPaths(torch.tensor([[3, 1, 2]]))):
        restricted = model(ids_BS, output_routings=True).routings
    assert tops(restricted).unique(dim=0).tolist() == [[3, 1, 2]]


def test_tokens_take_the_best_of_the_counted_paths_by_the_scores_of_the_free_pass(tiny, ids_BS):
    model = tiny()
    with traced(model) as trace:
        free = model(ids_BS, output_routings=True).routings
    path_NR = trace.top_paths(3)
    expected = best_paths([routing.logits_TE.log_softmax(-1) for routing in free], path_NR)
    with traced(model) as outer, perturbed(model, FrequentPaths(path_NR)), traced(model) as inner:
        routings = model(ids_BS, output_routings=True).routings
    assert torch.equal(tops(routings), expected)
    for restricted in (outer, inner):  # the free pass is in neither
        assert restricted.num_tokens == 16
        assert len(restricted.paths) <= 3


def test_a_cache_and_wrong_paths_are_refused(tiny, ids_BS):
    model = tiny()
    paths = FrequentPaths(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="cache"), perturbed(model, paths):
        model.generate(ids_BS, max_new_tokens=2)
    with pytest.raises(ValueError, match="must itself be called"), perturbed(model, paths):
        model.model(ids_BS)
    with pytest.raises(ValueError, match="2 routers"), perturbed(model, FrequentPaths(torch.zeros(1, 2))):
        model(ids_BS)
    with pytest.raises(ValueError, match="non-empty"):
        FrequentPaths(torch.zeros(0, 3))
    assert not model._forward_pre_hooks
