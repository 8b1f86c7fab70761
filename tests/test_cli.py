"""The command itself: what it prints, what it writes, and one line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from crossways import __version__, cli, hub
from crossways.models import CrosswaysForCausalLM
from crossways.study.record import RunRecord
from crossways.training import sources


@pytest.fixture
def crossways(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["crossways", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_help_imports_nothing_heavy():
    code = "import sys, crossways.cli; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version_and_recipes(crossways):
    assert crossways("--version") == (0, f"crossways {__version__}\n", "")
    code, out, _ = crossways("recipes")
    assert code == 0
    assert "quickstart: Three routings" in out


def test_a_dry_run_prints_the_resolved_recipe_and_trains_nothing(crossways, write_recipe, tmp_path):
    recipe, out = write_recipe(), tmp_path / "out"
    code, text, err = crossways("study", recipe, "--out", out, "--dry-run", "--set", "training.max_steps=9")
    resolved = yaml.safe_load(text)
    assert (code, err) == (0, "")
    assert resolved["training"]["max_steps"] == 9
    assert set(resolved["resolved"]) == {"dense", "routed"}
    assert not out.exists()


def test_study_report_and_eval_agree(crossways, write_recipe, tmp_path):
    out = tmp_path / "out"
    code, text, err = crossways("study", write_recipe(), "--out", out, "--seeds", "0,3", "--only", "routed")
    assert (code, err) == (0, "")
    assert f"report: {out / 'report.html'}" in text
    record = RunRecord.load(out / "routed" / "seed-3" / "record.json")

    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert crossways("report", out)[0] == 0
    assert (out / "report.html").read_bytes() == page

    model = out / "routed" / "seed-3" / "model"
    code, text, _ = crossways("eval", model)
    assert code == 0
    assert "bits per byte" in text
    result = json.loads((model / "evaluation.json").read_text(encoding="utf-8"))
    assert result["evaluation"] == record.evaluation.model_dump(mode="json")

    code, _, _ = crossways(
        "eval", model, "--causal", "--set", "evaluation.window=8", "--out", tmp_path / "causal.json"
    )
    causal = json.loads((tmp_path / "causal.json").read_text(encoding="utf-8"))
    assert code == 0
    assert causal["causal_routing"]
    assert not causal["evaluation"]["leaky"]
    assert causal["evaluation"]["protocol"]["window"] == 8
    assert causal["evaluation"]["perplexity"] != result["evaluation"]["perplexity"]


def test_what_eval_finds_about_a_hub_model_lands_among_the_runs(crossways, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(
        "crossways.evaluation.command.evaluate_checkpoint", lambda *given, **_: asked.append(given[1])
    )
    for name in ("owner/name", tmp_path):
        assert crossways("eval", name)[0] == 0
    assert asked == [Path("runs/name/evaluation.json"), tmp_path / "evaluation.json"]


def test_eval_takes_another_corpus(crossways, write_recipe, tmp_path):
    out = tmp_path / "out"
    assert crossways("train", write_recipe(), "--variant", "dense", "--out", out)[0] == 0
    text = tmp_path / "other"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text(f"other words number {i}", encoding="utf-8")
    model = out / "dense" / "seed-0" / "model"
    assert crossways("eval", model, "--corpus", text)[0] == 0
    result = json.loads((model / "evaluation.json").read_text(encoding="utf-8"))
    assert result["settings"]["corpus"]["source"] == str(text)
    assert result["evaluation"]["protocol"]["documents"] == 1


def test_export_writes_what_plain_transformers_loads(crossways, write_recipe, tmp_path):
    recipe = write_recipe(variants__routed__model={"score": "softmax"})
    assert crossways("train", recipe, "--variant", "routed", "--out", tmp_path / "out")[0] == 0
    model, exported = tmp_path / "out" / "routed" / "seed-0" / "model", tmp_path / "exported"
    assert crossways("export", model, "--to", "qwen2-moe", "--out", exported)[0] == 0
    ids = torch.arange(12)[None]
    ours = CrosswaysForCausalLM.from_pretrained(model)(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(exported)
    assert type(plain).__module__.startswith("transformers.")
    torch.testing.assert_close(plain(ids).logits, ours)


def test_export_refuses_what_a_family_cannot_express(crossways, write_recipe, tmp_path):
    assert crossways("train", write_recipe(), "--variant", "routed", "--out", tmp_path / "out")[0] == 0
    model, exported = tmp_path / "out" / "routed" / "seed-0" / "model", tmp_path / "exported"
    code, _, err = crossways("export", model, "--to", "qwen2-moe", "--out", exported)
    assert (code, err.count("\n")) == (2, 1)
    assert "top_c" in err
    assert not exported.exists()


def test_train_does_one_run_where_study_finds_it(crossways, write_recipe, tmp_path):
    recipe, out = write_recipe(), tmp_path / "out"
    code, text, _ = crossways("train", recipe, "--variant", "dense", "--seed", 1, "--out", out)
    record = out / "dense" / "seed-1" / "record.json"
    assert code == 0
    assert str(out / "dense" / "seed-1" / "model") in text
    before = record.stat().st_mtime_ns
    assert crossways("study", recipe, "--out", out)[0] == 0
    assert record.stat().st_mtime_ns == before
    assert len(list(out.glob("*/seed-*/record.json"))) == 4


MISTAKES = {
    "unknown key": ({"training__max_step": 3}, "unknown key 'training.max_step'; the nearest known key is"),
    "wrong value": ({"training__max_steps": "lots"}, "training.max_steps = 'lots' is not accepted"),
    "k above E": (
        {"model__select": {"name": "top_k", "k": 5}, "variants__routed__model": {}},
        "k = 5 with 4 experts",
    ),
    "unmatched budget": (
        {"variants__x": {"model": {"num_experts": 2, "select": {"name": "top_k", "k": 2}}}},
        "cannot be brought within",
    ),
    "missing corpus": ({"corpus__source": "/nowhere/at/all.txt"}, "/nowhere/at/all.txt"),
    "corpus too short": ({"training__sequence_length": 64, "corpus__max_documents": 2}, "corpus too short"),
    "context too short": ({"evaluation__window": 100}, "exceeds the context"),
    "diverging": ({"model__initializer_range": 1.0, "training__learning_rate": 1e38}, "at step"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name, crossways, write_recipe, tmp_path):
    changes, expected = MISTAKES[name]
    if name == "corpus too short":
        changes = {**changes, "evaluation__window": 8, "tokenizer__vocab_size": 400}
    code, _, err = crossways("study", write_recipe(**changes), "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not list(tmp_path.glob("out/*/*/record.json"))
    assert not (tmp_path / "out" / "report.html").exists()


def test_an_empty_corpus_is_one_line(crossways, write_recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("\n", encoding="utf-8")
    for source in (tmp_path / "empty", tmp_path / "empty" / "*.md"):
        code, _, err = crossways("study", write_recipe(corpus__source=str(source)), "--out", tmp_path / "out")
        assert (code, err.count("\n")) == (2, 1)
        assert "empty" in err


COMMANDS = {
    "study quickstrat": "did you mean 'quickstart'",
    "study quickstart --seeds 0,x": "--seeds '0,x'",
    "study quickstart --set title": "dotted.key=value",
    "study quickstart --only dens --out {tmp}": "did you mean 'dense'",
    "train quickstart --variant dens": "did you mean 'dense'",
    "eval {tmp}": "no saved model",
    "eval {tmp} --set training.max_steps=1": "unknown key 'training'",
    "eval {tmp} --recipe quickstrat": "did you mean 'quickstart'",
    "eval nowhere": "no model 'nowhere': there is no such folder",
    "calibrate nowhere --out {tmp}/x": "no model 'nowhere'",
    "reroute nowhere": "no model 'nowhere'",
    "tune nowhere --out {tmp}/x": "no model 'nowhere'",
    "upcycle nowhere --out {tmp}/x": "no model 'nowhere'",
    "study quickstart --out {tmp} --set corpus.source=stdlb": "no dataset 'stdlb' (did you mean 'stdlib'?)",
    "report {tmp}": "not the folder of a study",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_is_one_line(command, crossways, tmp_path, monkeypatch):
    for module in (hub, sources):
        monkeypatch.setattr(module, "ask_hub", lambda name, kind: "silent")
    monkeypatch.setattr(sources, "_prepared", lambda source, cache_dir: False)
    code, _, err = crossways(*command.format(tmp=tmp_path).split())
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert COMMANDS[command] in err


def test_a_mistake_is_one_line_in_a_process_of_its_own_too(write_recipe, tmp_path):
    recipe = write_recipe(training__learning_rate=1e38, training__warmup_fraction=0)
    command = [sys.executable, "-m", "crossways.cli", "study", str(recipe), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stdout


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, crossways):
    from crossways.study import load

    def fail(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(load, "load_recipe", fail)
    with pytest.raises(ZeroDivisionError):
        crossways("study", "quickstart")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["study"], "Missing argument 'RECIPE'"),
        (["study", "quickstart", "--no-such-option"], "No such option"),
        (["no-such-command"], "No such command 'no-such-command'"),
        (["train", "quickstart"], "Missing option '--variant'"),
        (["calibrate", "x", "--out", "y", "--tokens", "0"], "--tokens"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_that_the_parser_finds_are_one_line_too(crossways, arguments, message):
    code, out, err = crossways(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message.lower() in err.lower()


def test_no_command_prints_the_help(crossways):
    code, out, err = crossways()
    assert code == 2
    assert "Usage" in out + err


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "crossways", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"crossways {__version__}\n")
