"""Sensitivities of a model one layer of which can be cut for nothing."""

import pytest
import torch

from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import reroute
from crossways.tuning.bench import Bench, with_cutoffs
from crossways.tuning.families import FAMILIES, family_rule, own_routing
from crossways.tuning.score import score_text
from crossways.tuning.sensitivity import level_budgets, measure_sensitivities
from crossways.tuning.store import Store
from crossways.tuning.texts import make_texts


@pytest.fixture
def texts(tokenizer, corpus, protocol, settings):
    return make_texts(tokenizer, corpus, protocol, settings)


@pytest.fixture
def bench(olmoe, texts, tmp_path):
    return Bench(olmoe, Store(tmp_path, {}), texts.calibration)


@pytest.fixture
def own(olmoe):
    with reroute(olmoe, "own") as handle:
        return own_routing(handle)


@pytest.mark.parametrize("family", ["token-choice", "usmoe-threshold", "threshold"])
def test_cutting_the_idle_layer_costs_nothing_and_others_something(bench, own, texts, family):
    found = measure_sensitivities(bench, FAMILIES[family], own, (0.25, 0.5), texts.sensitivity)
    assert [each.layer for each in found] == [f"model.layers.{n}.mlp" for n in range(3)]
    assert found[1].loss_N == (0.0, 0.0, 0.0)
    assert all(each.budget_N == (1.0, 2.0, 4.0) for each in found)
    assert all(abs(each.loss_N[0]) > 0.01 for each in (found[0], found[2]))
    assert handle_of(bench.model) is None


def test_a_sensitivity_is_the_loss_when_that_layer_alone_is_cut(bench, own, texts):
    found = measure_sensitivities(bench, FAMILIES["token-choice"], own, (0.5,), texts.sensitivity)
    nats = []
    for k in ([4, 4, 4], [2, 4, 4], [4, 4, 2]):
        with reroute(bench.model, select="top_k", k=k):
            nats.append(score_text(bench.model, texts.sensitivity).nats)
    assert found[0].loss_N[0] == pytest.approx(nats[1] - nats[0], abs=1e-9)
    assert found[2].loss_N[0] == pytest.approx(nats[2] - nats[0], abs=1e-9)


def test_a_cut_threshold_spends_its_level_and_the_others_what_they_did(bench, own, texts):
    """The cutoffs come from one pass; here they are held to what they execute on the text they were set on."""
    family = FAMILIES["threshold"]
    rule = family_rule(family, own, own.k_L)
    measure_sensitivities(bench, family, own, (0.25, 0.5), texts.sensitivity)
    estimates = bench.calibrated(rule)
    kept = [entry for entry in bench.store.folder.glob("*.json") if '"level cutoffs"' in entry.read_text()]
    assert len(kept) == 1
    cutoffs = bench.store.get(*_again(kept[0]))
    for layer, cutoff_N in enumerate(cutoffs):
        cut = bench.score(rule, with_cutoffs(estimates, layer, [cutoff_N[0]]), texts.calibration).executed_L
        assert cut[layer] == pytest.approx(1.0, abs=0.01)
        uncut = bench.score(rule, estimates, texts.calibration).executed_L
        assert cut[:layer] == uncut[:layer]


def _again(path):
    import json

    return json.loads(path.read_text())["key"], lambda: pytest.fail("measured again")


def test_levels_are_whole_and_at_least_one_where_they_must_be():
    token_choice, threshold = FAMILIES["token-choice"], FAMILIES["threshold"]
    assert level_budgets(token_choice, 8, (0.75, 0.25, 0.3, 0.01)) == (1.0, 2.0, 6.0)
    assert level_budgets(token_choice, 1, (0.5,)) == ()
    assert level_budgets(threshold, 2, (0.25, 0.5)) == (0.5, 1.0)


def test_kept_weights_are_those_among_the_own_experts(qwen):
    """In a model that scales weights to sum to one, each pair that is still chosen weighs what it did. In float64:
    the two rules round differently, and this model makes a hundred times as much of it."""
    qwen.double().set_experts_implementation("eager")  # torch's grouped product takes no float64
    qwen.model.layers[1].mlp.gate.norm_topk_prob = True
    qwen.model.layers[2].mlp.gate.norm_topk_prob = True
    qwen.model.layers[3].mlp.gate.norm_topk_prob = True
    ids = torch.arange(2, 30)[None]
    family = FAMILIES["token-choice-kept"]
    with torch.no_grad(), reroute(qwen, "own") as handle:
        own = own_routing(handle)
        before = qwen(ids).logits
        whole = handle.blocks[0].routing.assignment.to_dense()
    assert family.applies(own)
    assert own.kept_score == {"name": "among_top", "k": 4, "of": "softmax"}
    with torch.no_grad(), reroute(qwen, family_rule(family, own, own.k_L)):
        torch.testing.assert_close(qwen(ids).logits, before)
    with torch.no_grad(), reroute(qwen, family_rule(family, own, (2, 4, 4))) as handle:
        qwen(ids)
        cut = handle.blocks[0].routing.assignment.to_dense()
    assert ((cut > 0).sum(-1) == 2).all()
    torch.testing.assert_close(cut[cut > 0], whole[cut > 0], check_dtype=False)


def test_a_model_that_keeps_weights_anyway_needs_no_family_for_it(own):
    assert own.kept_score is None
    assert not FAMILIES["threshold-kept"].applies(own)


def test_the_rules_of_a_family_keep_what_is_the_models_own(qwen):
    with reroute(qwen, "own") as handle:
        own = own_routing(handle)
    assert own.layers == ("model.layers.1.mlp", "model.layers.2.mlp", "model.layers.3.mlp")
    assert (own.k_L, own.mean_k) == ((4, 4, 4), 4.0)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        before = qwen(ids).logits
        with reroute(qwen, family_rule(FAMILIES["token-choice"], own, own.k_L)):
            assert torch.equal(qwen(ids).logits, before)
