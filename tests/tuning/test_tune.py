"""A whole tuning: it finds the idle layer, confirms, saves what a fresh process loads, goes on, and refuses."""

import csv
import json
import math
import subprocess
import sys

import pytest
import torch

import crossways
from crossways.errors import UserError
from crossways.evaluation.settings import EvaluationSettings
from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import reroute
from crossways.tuning import bench, check
from crossways.tuning.compare import Difference
from crossways.tuning.tune import tune

FRESH = """
import sys, json, crossways
from pathlib import Path
from crossways.tuning.check import load_text
from crossways.tuning.score import score_text
import torch
torch.set_num_threads(1)
model = crossways.from_pretrained(Path(sys.argv[1]) / "model").eval()
print(json.dumps(score_text(model, load_text(Path(sys.argv[1]) / "confirmation.npz")).nats_D))
"""


@pytest.fixture
def run(olmoe, tokenizer, corpus, settings, protocol, tmp_path):
    """Tune the model with the idle layer; keyword arguments replace settings."""

    def tuned(max_loss="5%", model=olmoe, text=corpus, verify=False, **changes):
        changed = settings.model_copy(update=changes)
        return tune(
            model, tokenizer, text, tmp_path, max_loss=max_loss, settings=changed, protocol=protocol, verify=verify
        )

    return tuned


def test_it_cuts_the_idle_layer_and_saves_what_a_fresh_process_loads(run, olmoe, tmp_path):
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        before = olmoe(ids).logits
    result = run(verify=True)
    assert result.chosen is not None
    assert (result.chosen.setting.family, result.chosen.setting.allocation) == ("token-choice", "per-layer")
    assert result.chosen.setting.budget_L[1] == 2.0
    assert result.chosen.scored.executed_L[1] == 2.0
    confirmation = result.confirmation
    assert confirmation.verdict == "confirmed"
    assert confirmation.saved == pytest.approx(1 - confirmation.chosen.budget / 4)
    assert result.reload.identical
    fresh = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True, check=True)
    assert tuple(json.loads(fresh.stdout)) == confirmation.chosen.nats_D
    assert handle_of(olmoe) is None
    with torch.no_grad():
        assert torch.equal(olmoe(ids).logits, before)


def test_the_evidence_lies_beside_the_checkpoint(run, tmp_path):
    result = run()
    kept = json.loads((tmp_path / "frontier.json").read_text())
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    assert len(rows) == len(kept["points"]) + 1 == len(result.points) + 1
    assert [row["chosen"] for row in rows].count("True") == 1
    assert kept["chosen"]["rule"] == result.chosen.setting.rule.to_json()
    assert kept["confirmation"]["difference"]["nats"] <= math.log(1.05)
    assert kept["checkpoint"] == "model"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["crossways_routing"]["rule"] == kept["chosen"]["rule"]
    for row, point in zip(rows[1:], result.points, strict=True):
        pairs, tokens = sum(point.scored.pairs_L), point.scored.routed_tokens
        assert float(row["experts_per_token"]) == pytest.approx(pairs / 3 / tokens)
        assert float(row["share_of_original_flops"]) == pytest.approx(pairs / 12 / tokens)


def test_per_layer_budgets_beat_uniform_ones_of_the_same_cost(run):
    points = {
        (p.setting.allocation, p.scored.budget): p.difference.nats
        for p in run().points
        if p.setting.family == "token-choice"
    }
    assert points["per-layer", 3.0] < points["uniform", 3.0] - 0.01


def test_a_threshold_can_be_chosen_and_keeps_its_cutoffs(run, tmp_path):
    result = run(max_loss="1nats", families=("usmoe-threshold",))
    assert result.chosen.setting.family == "usmoe-threshold"
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["crossways_routing"]["estimates"] == result.chosen.estimates
    reloaded = check.check(tmp_path)
    assert reloaded.identical
    assert reloaded.perplexity == result.confirmation.chosen.perplexity


def test_the_leaky_rule_is_drawn_and_never_chosen(run, tmp_path):
    result = run(max_loss="9nats", families=("usmoe", "token-choice"))
    leaky = [point for point in result.points if point.setting.family == "usmoe"]
    assert {point.setting.allocation for point in leaky} == {"uniform", "per-layer"}
    assert result.chosen.setting.family == "token-choice"
    assert "usmoe,uniform,True" in (tmp_path / "frontier.csv").read_text()
    assert "USMoE, global budget, uniform budgets<sup>†</sup>" in (tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match="none may be chosen"):
        run(families=("usmoe",))


def test_the_same_command_goes_on_where_it_stopped(run, monkeypatch):
    real, calls = bench.score_text, []

    def dies(*arguments):
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments)

    monkeypatch.setattr(bench, "score_text", dies)
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(bench, "score_text", lambda *a: calls.append(a) or real(*a))
    whole = run()
    made = len(calls)
    monkeypatch.setattr(bench, "score_text", lambda *_: pytest.fail("measured again"))
    again = run()
    assert again.points == whole.points
    assert again.chosen == whole.chosen
    assert again.confirmation == whole.confirmation
    assert len(calls) == made


def test_nothing_is_chosen_when_nothing_qualifies(run, tmp_path):
    assert run(max_loss="50%").checkpoint is not None
    result = run(max_loss="0nats")
    assert (result.chosen, result.confirmation, result.checkpoint, result.timing) == (None,) * 4
    assert "no setting keeps the loss within 0nats" in result.reason
    assert not (tmp_path / "model").exists()
    assert json.loads((tmp_path / "frontier.json").read_text())["chosen"] is None
    assert "Nothing was chosen" in (tmp_path / "report.html").read_text()


def test_a_choice_that_other_text_contradicts_is_not_saved(run, tmp_path, monkeypatch):
    worse = Difference(0.5, 0.4, 0.6, 30)
    monkeypatch.setattr("crossways.tuning.confirm.paired_difference", lambda *_, **__: worse)
    result = run()
    assert result.chosen is not None
    assert result.confirmation.verdict == "contradicted"
    assert "not borne out" in result.reason
    assert result.checkpoint is None
    assert not (tmp_path / "model").exists()


def test_nothing_is_chosen_by_the_confirmation_text(run, monkeypatch):
    """It is scored twice, after all else."""
    digests = []
    real = bench.Bench.score

    def watched(self, rule, estimates, text):
        digests.append(text.digest)
        return real(self, rule, estimates, text)

    monkeypatch.setattr(bench.Bench, "score", watched)
    held_out = run().protocol["texts"]["confirmation"]["digest"]
    assert digests.count(held_out) == 2
    assert digests[-2:] == [held_out, held_out]


def test_the_fresh_process_sees_a_broken_checkpoint(run, tmp_path):
    run()
    assert check.check(tmp_path).identical
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["crossways_routing"]["rule"]["budgets"] = [1.0, 1.0, 1.0]
    path.write_text(json.dumps(config))
    found = check.check(tmp_path)
    assert not found.identical
    assert found.budget == 1.0
    (tmp_path / "model" / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(RuntimeError, match="a fresh process could not load"):
        check.check_in_fresh_process(tmp_path)


def test_a_rerouted_model_is_tuned_from_its_familys_own_routing(run, olmoe):
    whole = run()
    reroute(olmoe, select="top_k", k=1)
    assert run().original.scored == whole.original.scored


def test_times_are_taken_of_scoring_and_generation(run):
    timing = run(rounds=2, decode_tokens=3, prefill_rows=2).timing
    assert [each.task for each in timing.timed] == [
        "scoring, 2 x 41 tokens",
        "generation, 1 at a time",
        "generation, 4 at a time",
    ]
    for each in timing.timed:
        assert each.rounds == 2
        assert each.original > 0
        assert each.chosen > 0
        assert 0 < each.speedup_low <= each.speedup <= each.speedup_high


def test_the_package_offers_it(olmoe, tokenizer, corpus, tmp_path, settings):
    result = crossways.tune(
        olmoe,
        tokenizer,
        corpus,
        tmp_path,
        max_loss="50%",
        settings=settings,
        protocol=EvaluationSettings(window=48, batch_size=8),
        verify=False,
    )
    assert result.checkpoint == tmp_path / "model"


def test_impossible_models_are_refused(run, tiny):
    with pytest.raises(UserError, match="crossways' own models"):
        run(model=tiny())


def test_a_window_beyond_the_context_is_refused(olmoe, tokenizer, corpus, tmp_path):
    with pytest.raises(UserError, match=r"evaluation\.window 65 exceeds the model's context of 64"):
        tune(olmoe, tokenizer, corpus, tmp_path, protocol=EvaluationSettings(window=65))


def test_the_original_is_timed_bare_and_the_choice_rerouted(run, olmoe, monkeypatch):
    seen = []

    def note(model, ids):
        handle = handle_of(model)
        seen.append(model.config._experts_implementation if handle is None else handle.rule)

    monkeypatch.setattr("crossways.tuning.timing._score", note)
    before = olmoe.config._experts_implementation
    result = run(rounds=4, decode_rows=())
    contenders = [before, result.chosen.setting.rule, *(["crossways"] if result.timing.chosen_experts else [])]
    rounds = [seen[at : at + len(contenders)] for at in range(0, len(seen), len(contenders))]
    assert rounds == [contenders, contenders[::-1]] * 2 + [contenders]
    assert olmoe.config._experts_implementation == before
    assert (result.timing.timed[0].by_experts is not None) == (len(contenders) == 3)


def test_a_window_that_nobody_asked_for_fits_the_model(olmoe, tokenizer, corpus, settings, tmp_path):
    result = tune(olmoe, tokenizer, corpus, tmp_path, settings=settings, verify=False)
    assert result.protocol["window"] == 64
