"""`crossways harness` and `crossways embed` on every kind of checkpoint, and what is said if an extra is missing."""

import json
import subprocess
import sys

import pytest

import crossways as crossways_package
from crossways import extras
from crossways.errors import UserError
from crossways.evaluation.harness.run import evaluate_harness
from crossways.evaluation.prepared import numbers, prepared
from crossways.surgery.handle import handle_of

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed: lm-eval")

TASK = f"{__file__.rpartition('/')[0]}/tasks/next_word.yaml"


@pytest.fixture
def saved(build, calibrated, byte_tokenizer, tmp_path):
    """A saved checkpoint of a kind, and the model it was saved from."""

    def save(kind):
        model = build("ours" if kind == "ours" else "olmoe")
        if kind == "rerouted":
            crossways_package.reroute(model, "usmoe", k=1.5)
        if kind != "plain":
            calibrated(model)
        model.save_pretrained(tmp_path / kind)
        byte_tokenizer.save_pretrained(tmp_path / kind)
        return tmp_path / kind, model

    return save


@pytest.mark.parametrize("kind", ["plain", "rerouted", "ours"])
def test_figures_from_disk_are_those_from_memory(crossways, saved, byte_tokenizer, tmp_path, kind):
    folder, model = saved(kind)
    code, out, err = crossways("harness", folder, "--tasks", TASK, "--out", tmp_path / "record.json")
    assert code == 0, err
    assert "next_word" in out
    assert "acc,none" in out
    record = json.loads((tmp_path / "record.json").read_text())
    here = json.loads(evaluate_harness(model, byte_tokenizer, TASK, name=str(folder)).model_dump_json())
    assert record == here
    assert record["format"] == "crossways-harness/1"
    assert (record["routing"]["twin"] is None) == (kind == "plain")


def test_a_preset_is_calibrated_and_then_measured(crossways, saved, tmp_path):
    folder, _ = saved("plain")
    (tmp_path / "text.txt").write_text("Rain falls on the roof, and a dog runs.\n\n" * 30)
    arguments = ("harness", folder, "--tasks", TASK, "--limit", 2, "--rule", "usmoe", "-k", "1,2,1.5")
    code, _, err = crossways(*arguments)
    assert code == 2
    assert err.startswith("error: the decode twin of 'top_c' has no cutoff yet")
    code, out, _ = crossways(*arguments, "--leaky")
    assert code == 0
    assert out.count("(leaky)") == 2
    assert "may flatter: a token's experts depend on later tokens" in out


def test_calibration_text_gives_the_twin_its_cutoffs(saved, tmp_path):
    folder, _ = saved("plain")
    texts = [json.dumps({"text": f"Rain falls on roof number {n}, and a dog runs."}) for n in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    model, _ = prepared(str(folder), rule="usmoe", calibrate_on=str(tmp_path / "text.jsonl"), calibrate_tokens=500)
    assert all(not router.cutoff.isnan().any() for router in handle_of(model).routers.values())


def test_mistakes_are_one_line(crossways, saved, tmp_path):
    folder, _ = saved("ours")
    for arguments, message in (
        (("harness",), "give a MODEL and --tasks"),
        (("embed", folder), "give a MODEL and --tasks"),
        (("harness", folder, "--tasks", TASK, "--rule", "usmoe"), "its rule is in its configuration"),
        (("harness", folder, "--tasks", TASK, "-k", "2"), "-k is for --rule"),
        (("harness", folder, "--tasks", TASK, "--dtype", "int3"), "unknown dtype 'int3'"),
        (("harness", tmp_path / "no", "--tasks", TASK), "does not exist"),
        (("embed", folder, "--tasks", "STS12", "--kind", "hss"), "kind = 'hss' is not accepted"),
        (("embed", folder, "--tasks", "STS12", "--set", "batchsize=2"), "nearest known key is 'batch_size'"),
        (("embed", folder, "--tasks", "STS12", "--fit-on", tmp_path / "no.txt"), "cannot read"),
        (("embed", folder, "--tasks", "cartesianmoe"), "for lm-eval, not mteb"),
    ):
        code, _, err = crossways(*arguments)
        assert code == 2, message
        assert message in err
        assert err.splitlines()[-1].startswith("error: ")
    with pytest.raises(UserError, match="numbers separated by commas"):
        numbers("2,x")


def test_a_missing_extra_is_named(crossways, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None if name in ("lm_eval", "mteb") else object())
    code, _, err = crossways("harness", "model", "--tasks", TASK)
    assert (code, err) == (2, "error: lm_eval not installed: pip install 'crossways[eval]'\n")
    code, _, err = crossways("embed", "model", "--tasks", "STS12")
    assert (code, err) == (2, "error: mteb not installed: pip install 'crossways[eval]'\n")


def test_nothing_heavy_is_imported_before_it_is_needed():
    program = (
        "import sys, crossways.cli\n"
        "assert 'torch' not in sys.modules\n"
        "import crossways.evaluation.harness.run, crossways.evaluation.embeddings.run\n"
        "assert not {'mteb', 'lm_eval', 'sentence_transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
