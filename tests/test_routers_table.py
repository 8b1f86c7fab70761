"""The table of trained methods: rows, markers, and runs that are kept."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from crossways.training.settings import TrainingSettings

ROOT = Path(__file__).parents[1]
ROW = {
    "name": "usmoe",
    "diverged": "",
    "loss": 3.14159,
    "perplexity": 20.0,
    "causal_perplexity": 21.5,
    "calibrated_perplexity": 20.5,
    "leaky": True,
    "budget": 2.0,
    "causal_budget": 2.4,
    "calibrated_budget": 2.01,
    "dead": 1,
    "experts": 32,
    "imbalance": 1.5,
}


@pytest.fixture
def bench():
    spec = importlib.util.spec_from_file_location("routers_train", ROOT / "benchmarks" / "routers_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_by_hand(bench):
    lost = {"name": "bad", "diverged": "the loss became nan at step 3"}
    head, rule, row, diverged = bench.table([ROW, lost]).splitlines()
    assert row == "| usmoe | 3.142 | 20.00 (leaky) | 21.50 | 20.50 | 2.00 | 2.40 | 2.01 | 1 of 32 | 1.50 | no |"
    assert diverged.startswith("| bad |")
    assert diverged.endswith("| the loss became nan at step 3 |")
    assert len({line.count("|") for line in (head, rule, row, diverged)}) == 1


def test_the_table_replaces_what_is_between_the_markers(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.START}\nold\n{bench.END}\nafter\n")
    bench.insert(page, [ROW])
    bench.insert(page, [ROW])
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert text.count("| usmoe |") == 1
    assert "old" not in text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        bench.insert(page, [ROW])


def test_lines_of_methods_that_were_not_trained_again_are_kept(bench, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"{bench.START}\n{bench.END}\n")
    bench.insert(page, [ROW, ROW | {"name": "base", "loss": 9.0}])
    bench.insert(page, [ROW | {"loss": 2.0}])
    lines = page.read_text().splitlines()
    assert [line.split("|")[1:3] for line in lines if line.startswith(("| usmoe", "| base"))] == [
        [" usmoe ", " 2.000 "],
        [" base ", " 9.000 "],
    ]


def test_a_method_is_trained_once(bench, tmp_path, monkeypatch):
    def short(steps):
        return TrainingSettings(max_steps=steps, sequence_length=32, batch_size=2, logging_steps=1, report_to="none")

    monkeypatch.setattr(bench, "training_settings", short)
    monkeypatch.setattr(bench, "CORPUS", bench.CORPUS.model_copy(update={"max_bytes": 60_000}))
    monkeypatch.setattr(bench, "TOKENIZER", bench.TOKENIZER.model_copy(update={"vocab_size": 300}))
    monkeypatch.setattr(bench, "EVALUATION", bench.EVALUATION.model_copy(update={"max_tokens": 500, "window": 64}))
    page = tmp_path / "page.md"
    page.write_text(f"{bench.START}\n{bench.END}\n")
    command = ["usmoe", "token-choice", "--steps", "3", "--out", str(tmp_path), "--page", str(page)]
    bench.main(command)
    row = json.loads((tmp_path / "usmoe.json").read_text())
    assert (row["diverged"], row["leaky"], row["experts"]) == ("", True, 32)
    assert row["calibrated_budget"] == pytest.approx(2, abs=0.3)
    assert page.read_text().count("| no |") == 2
    monkeypatch.setattr(bench, "train_model", lambda *a, **k: pytest.fail("trained again"))
    bench.main(command)
    with pytest.raises(pytest.fail.Exception):
        bench.main([*command, "--steps", "4"])


def test_the_page_in_the_docs_has_every_listed_method(bench):
    from crossways.methods import methods

    text = (ROOT / "docs" / "routers.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.endswith("|") and "`" not in line][2:]
    assert rows == list(methods())
    assert "diverged at" not in text
