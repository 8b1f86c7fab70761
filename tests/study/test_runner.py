"""Studies end to end on a tiny corpus: nothing is repeated, nothing is lost, nothing is half-written."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from filelock import FileLock
from rich.console import Console

from crossways.errors import UserError
from crossways.study import execute as execute_module
from crossways.study import runner
from crossways.study.load import load_recipe
from crossways.study.record import RunRecord
from crossways.study.runner import run_study


@pytest.fixture
def quiet():
    return Console(file=open(os.devnull, "w", encoding="utf-8"), width=200)


def records(out):
    return {f"{p.parts[-3]} {p.parts[-2]}": p for p in sorted(out.glob("*/seed-*/record.json"))}


ALL = ["dense seed-0", "dense seed-1", "routed seed-0", "routed seed-1"]


def test_a_study_leaves_a_record_per_run_a_table_and_a_page(write_recipe, tmp_path, quiet):
    recipe, out = load_recipe(str(write_recipe())), tmp_path / "out"
    result = run_study(recipe, out, console=quiet)
    assert list(records(out)) == ALL
    assert [(r.variant, r.seed) for r in result.records] == [("dense", 0), ("dense", 1), ("routed", 0), ("routed", 1)]
    record = RunRecord.load(records(out)["routed seed-1"])
    assert record.parameters.total > record.parameters.active
    assert record.training.steps == 4
    assert record.training.tokens == 4 * 2 * 16
    assert record.evaluation.causal_perplexity is not None
    assert record.evaluation.disabled is not None
    assert result.report == out / "report.html"
    page = result.report.read_text(encoding="utf-8")
    assert "Tiny &lt;study&gt;" in page
    assert "<study>" not in page
    assert "Dense" in (out / "table.md").read_text(encoding="utf-8")
    assert len((out / "table.csv").read_text(encoding="utf-8").splitlines()) == 3
    assert not list(out.glob("*/seed-*/trainer/checkpoint-*"))
    assert not list(out.rglob("*.tmp"))

    before = {name: path.stat().st_mtime_ns for name, path in records(out).items()}
    run_study(recipe, out, console=quiet)
    assert {name: path.stat().st_mtime_ns for name, path in records(out).items()} == before


def test_a_saved_run_is_a_model_that_only_transformers_is_needed_to_load(write_recipe, tmp_path, quiet):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from crossways.models import register

    out = tmp_path / "out"
    run_study(load_recipe(str(write_recipe())), out, only=["routed"], seeds=[5], console=quiet)
    assert list(records(out)) == ["routed seed-5"]
    register()
    folder = out / "routed" / "seed-5" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model(**tokenizer("the cat", return_tensors="pt")).logits.isfinite().all()


def test_an_interrupted_run_goes_on_and_gives_what_it_would_have_given(write_recipe, tmp_path, quiet, monkeypatch):
    recipe = load_recipe(str(write_recipe(training__max_steps=6)))
    run_study(recipe, tmp_path / "whole", only=["routed"], seeds=[0], console=quiet)
    out = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(execute_module, "save_model", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run_study(recipe, out, only=["routed"], seeds=[0], console=quiet)
    trainer = out / "routed" / "seed-0" / "trainer"
    assert not records(out)
    for newer in trainer.glob("checkpoint-6"):  # as if killed after step 4, while writing a later checkpoint
        for file in newer.iterdir():
            file.unlink()
    assert (trainer / "checkpoint-4").exists()
    steps = count_steps(monkeypatch)
    run_study(recipe, out, only=["routed"], seeds=[0], console=quiet)
    whole, cut = (RunRecord.load(records(o)["routed seed-0"]) for o in (tmp_path / "whole", out))
    assert len(steps) == 2
    assert cut.evaluation == whole.evaluation
    assert [point.loss for point in cut.curve] == [point.loss for point in whole.curve]
    assert cut.recipe_digest == whole.recipe_digest


def interrupt(*args):
    raise KeyboardInterrupt


def count_steps(monkeypatch):
    from crossways.training.trainer import CrosswaysTrainer

    steps, original = [], CrosswaysTrainer.training_step

    def step(self, *args, **kwargs):
        steps.append(self.state.global_step)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CrosswaysTrainer, "training_step", step)
    return steps


def test_changed_settings_are_refused_and_force_repeats_only_what_changed(write_recipe, tmp_path, quiet):
    out = tmp_path / "out"
    run_study(load_recipe(str(write_recipe())), out, seeds=[0], console=quiet)
    before = {name: path.stat().st_mtime_ns for name, path in records(out).items()}
    changed = load_recipe(str(write_recipe(variants__dense__training={"learning_rate": 0.002})))
    with pytest.raises(UserError) as caught:
        run_study(changed, out, seeds=[0], console=quiet)
    assert "dense/seed-0: training.learning_rate was 0.001 and is 0.002" in str(caught.value)
    assert "--force" in str(caught.value)
    assert {name: path.stat().st_mtime_ns for name, path in records(out).items()} == before
    run_study(changed, out, seeds=[0], force=True, console=quiet)
    after = {name: path.stat().st_mtime_ns for name, path in records(out).items()}
    assert after["routed seed-0"] == before["routed seed-0"]
    assert after["dense seed-0"] > before["dense seed-0"]


def test_a_changed_corpus_is_noticed_but_when_to_save_is_not(write_recipe, tiny_corpus, tmp_path, quiet):
    out = tmp_path / "out"
    run_study(load_recipe(str(write_recipe())), out, only=["dense"], seeds=[0], console=quiet)
    saving = load_recipe(str(write_recipe(training__save_steps=3)))
    run_study(saving, out, only=["dense"], seeds=[0], console=quiet)
    with tiny_corpus.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "something new"}) + "\n")
    with pytest.raises(UserError, match=r"corpus\.content was"):
        run_study(saving, out, only=["dense"], seeds=[0], console=quiet)


def test_a_run_that_diverges_leaves_no_record_and_costs_the_others_nothing(write_recipe, tmp_path, quiet):
    out = tmp_path / "out"
    recipe = load_recipe(str(write_recipe(variants__dense__training={"learning_rate": 1e38, "warmup_fraction": 0})))
    with pytest.raises(UserError, match=r"1 of 2 runs failed .*dense seed 0: .* at step \d") as caught:
        run_study(recipe, out, seeds=[0], console=quiet)
    assert "last good checkpoint" in str(caught.value)
    assert list(records(out)) == ["routed seed-0"]
    assert (out / "report.html").exists()


def test_an_unexpected_error_is_raised_after_the_other_runs(write_recipe, tmp_path, quiet, monkeypatch):
    from crossways.study import workers

    def fail(run, *args, **kwargs):
        if run.variant == "dense":
            raise RuntimeError("boom")
        return execute_module.execute(run, *args, **kwargs)

    monkeypatch.setattr(workers, "execute", fail)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="boom") as caught:
        run_study(load_recipe(str(write_recipe())), out, seeds=[0], console=quiet)
    assert "dense seed 0" in caught.value.__notes__[0]
    assert list(records(out)) == ["routed seed-0"]


def test_two_studies_do_not_share_a_folder(write_recipe, tmp_path, quiet):
    out = tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(UserError, match="another study is at work"):
        run_study(load_recipe(str(write_recipe())), out, console=quiet)


def test_seeds_and_variants_can_be_added(write_recipe, tmp_path, quiet):
    recipe, out = load_recipe(str(write_recipe())), tmp_path / "out"
    run_study(recipe, out, only=["dense"], seeds=[0], console=quiet)
    result = run_study(recipe, out, only=["dense"], seeds=[7], console=quiet)
    assert [(r.variant, r.seed) for r in result.records] == [("dense", 0), ("dense", 7)]
    with pytest.raises(UserError, match="did you mean 'dense'"):
        run_study(recipe, out, only=["dens"], console=quiet)


def test_failures_of_one_cause_are_one_reason():
    outcomes = [runner.Outcome(FakeRun(f"v{i}"), error=UserError("no\nspace")) for i in range(2)]
    with pytest.raises(UserError) as caught:
        runner._raise_failures(outcomes, 3)
    assert str(caught.value) == "2 of 3 runs failed and left no record: v0: no space"


class FakeRun:
    def __init__(self, name):
        self.name = name


def test_a_study_killed_among_its_workers_goes_on_where_it_stopped(write_recipe, tmp_path):
    # Long enough that the kill falls inside runs, on two worker processes.
    recipe, out = write_recipe(workers=2, training__max_steps=150, training__save_steps=10), tmp_path / "out"
    command = [sys.executable, "-m", "crossways.cli", "study", str(recipe), "--out", str(out)]
    study = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: records(out), study)
    os.kill(study.pid, signal.SIGKILL)
    study.wait()
    first = {name: path.stat().st_mtime_ns for name, path in records(out).items()}
    assert 0 < len(first) < 4
    time.sleep(1)
    assert {name: path.stat().st_mtime_ns for name, path in records(out).items()} == first  # no worker lives on
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr == ""
    assert list(records(out)) == ALL
    assert {name: records(out)[name].stat().st_mtime_ns for name in first} == first
    assert (out / "dense" / "seed-0" / "log.txt").exists()


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the study ended early"
        assert time.monotonic() < end, "the study did nothing"
        time.sleep(0.02)
