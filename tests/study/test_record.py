"""The record: strict, lossless, written whole or not at all."""

import json
import math
import os

import pytest
from pydantic import ValidationError

from crossways.errors import UserError
from crossways.study.atomic import write_text_atomic
from crossways.study.record import Comparison, CurvePoint, RunRecord


def test_save_and_load_give_the_same_record(make_record, tmp_path):
    record = make_record(leaky=True)
    path = record.save(tmp_path / "runs" / "one.json")
    assert RunRecord.load(path) == record
    assert os.listdir(path.parent) == ["one.json"]


def test_numbers_that_are_not_finite_survive_as_valid_json(make_record, tmp_path):
    points = [CurvePoint(step=1, tokens=1, loss=math.nan), CurvePoint(step=2, tokens=2, loss=math.inf)]
    path = make_record(curve=points).save(tmp_path / "r.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    losses = [point.loss for point in RunRecord.load(path).curve]
    assert math.isnan(losses[0])
    assert losses[1] == math.inf


def test_a_record_is_frozen(make_record):
    with pytest.raises(ValidationError, match="frozen"):
        make_record().seed = 3


@pytest.mark.parametrize("damage", ["unknown", "missing", "cut"])
def test_an_invalid_record_is_a_user_error_that_names_file_and_fault(make_record, tmp_path, damage):
    path = make_record().save(tmp_path / "bad.json")
    content = json.loads(path.read_text())
    if damage == "unknown":
        content["training"]["flavour"] = 1
    else:
        del content["seed"]
    path.write_text(path.read_text()[:50] if damage == "cut" else json.dumps(content))
    named = {"unknown": "training.flavour", "missing": "seed", "cut": "JSON"}[damage]
    with pytest.raises(UserError, match=rf"bad\.json.*{named}"):
        RunRecord.load(path)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = write_text_atomic(tmp_path / "a.txt", "old")

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_honest_figure_is_the_twins_for_a_leaky_rule_and_the_own_otherwise(make_record):
    leaky, causal = make_record(bits=2.0, leaky=True).evaluation, make_record(bits=2.1).evaluation
    assert (leaky.honest_bits_per_byte, leaky.honest_perplexity, leaky.honest_budget) == (2.0, 64.0, 1.9)
    assert causal.honest_bits_per_byte == causal.bits_per_byte == 2.1
    assert causal.honest_budget == 2.0


def test_a_leaky_figure_without_twin_is_never_passed_off_as_honest(make_record):
    evaluation = make_record(leaky=True).evaluation
    lone = evaluation.model_copy(update={"causal_perplexity": None, "causal_bits_per_byte": None})
    assert lone.honest_perplexity is None
    assert lone.honest_bits_per_byte is None
    assert lone.honest_budget is None


def test_a_comparison_puts_an_unnamed_baseline_first():
    assert Comparison(title="t", question="q", variants=["a", "b"], baseline="c").members == ("c", "a", "b")
    assert Comparison(title="t", question="q", variants=["a", "b"], baseline="b").members == ("a", "b")
