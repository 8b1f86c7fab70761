"""`crossways reroute`, and `eval` and `calibrate` on models of transformers, from the command line."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM

import crossways as package
from crossways import cli
from crossways.surgery.handle import CONFIG_KEY, handle_of
from crossways.surgery.rule import presets
from crossways.training.tokenizer import _wrap, train_bpe


@pytest.fixture
def crossways(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["crossways", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out = capsys.readouterr()
        return exit_.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def text(tmp_path):
    """Twelve documents."""
    path = tmp_path / "text.jsonl"
    words = ["the", "router", "sends", "every", "token", "to", "some", "of", "its", "experts", "and", "no", "more"]
    documents = [" ".join(words[(i * j) % len(words)] for j in range(40)) for i in range(1, 13)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    return path


@pytest.fixture
def plain(tmp_path, text):
    """A folder with a tiny OLMoE and its tokenizer."""
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    tokenizer = _wrap(train_bpe(documents, 280))
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    folder = tmp_path / "plain"
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def short(text):
    sets = ("evaluation.window=32", "evaluation.max_tokens=300", "corpus.validation_fraction=0.3")
    return ("--corpus", text, *(part for each in sets for part in ("--set", each)))


def perplexities(text):
    return [line for line in text.splitlines() if "perplexity" in line]


def test_the_list_names_every_preset(crossways):
    code, out, _ = crossways("reroute", "--list")
    assert code == 0
    for name, preset in presets().items():
        assert name in out
        assert preset.summary in out


def test_without_out_it_only_says_what_would_change(crossways, plain):
    before = sorted(plain.iterdir())
    code, out, _ = crossways("reroute", plain, "--rule", "usmoe", "-k", "1.5")
    assert code == 0
    assert "OlmoeForCausalLM: 2 blocks" in out
    assert "model.layers.1.mlp" in out
    assert "top_k(k=2) of softmax()" in out
    assert "top_c(k=1.5, group='sequence') of unified(" in out
    assert "generation needs a calibrated cutoff" in out
    assert sorted(plain.iterdir()) == before


def test_calibrated_saved_evaluated_and_calibrated_again(crossways, plain, text, tmp_path):
    out_folder = tmp_path / "routed"
    code, out, err = crossways("reroute", plain, "--rule", "usmoe", "-k", "1,2", *short(text), "--out", out_folder)
    assert code == 0, err
    assert "experts per token" in out
    report = json.loads((out_folder / "calibration.json").read_text())
    assert [router["target"] for router in report["routers"]] == [1, 2]
    saved = json.loads((out_folder / "config.json").read_text())[CONFIG_KEY]
    assert saved["rule"]["budgets"] == [1, 2]
    model = package.from_pretrained(out_folder)
    cutoffs = handle_of(model).estimates()
    assert cutoffs == saved["estimates"]
    assert all(len(known["cutoff"]) == 1 for known in cutoffs)
    assert crossways("eval", out_folder, *short(text))[0] == 0
    code, out, err = crossways("calibrate", out_folder, *short(text), "--out", tmp_path / "again", "--passes", 0)
    assert code == 0, err
    assert handle_of(package.from_pretrained(tmp_path / "again")).estimates() != cutoffs


def test_eval_sees_the_rule(crossways, plain, text, tmp_path):
    routed = tmp_path / "routed"
    assert crossways("reroute", plain, "--rule", "usmoe", *short(text), "--out", routed)[0] == 0
    results = {}
    for folder in (plain, routed):
        code, out, err = crossways("eval", folder, *short(text))
        assert code == 0, err
        results[folder] = out
    assert "top_k(k=2)" in results[plain]
    assert "top_c(k=2" in results[routed]
    assert results[plain] != results[routed]


def test_a_rule_as_json(crossways, plain, tmp_path):
    select, score = '{"name": "top_p", "p": 0.6, "cap": 3}', '{"name": "unified", "alpha": 0.8}'
    out_folder = tmp_path / "routed"
    code, _, err = crossways(
        "reroute", plain, "--select", select, "--score", score, "--renormalize", "--out", out_folder
    )
    assert code == 0, err
    rule = json.loads((out_folder / "config.json").read_text())[CONFIG_KEY]["rule"]
    assert rule == {"select": json.loads(select), "score": json.loads(score), "renormalize": True}


def test_a_rerouted_folder_may_be_rerouted_again(crossways, plain, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert crossways("reroute", plain, "--rule", "usmoe", "--out", one)[0] == 0
    code, out, _ = crossways("reroute", one, "--rule", "expert-choice", "--out", two)
    assert code == 0
    assert "top_k(k=2) of softmax()" in out, "the table starts from the family's own rule"
    assert handle_of(package.from_pretrained(two)).rule.select == {"name": "expert_choice"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a MODEL"),
        (("nowhere/at-all/x",), "holds no saved model: it does not exist"),
        (("/no/such/folder",), "does not exist"),
        (("package:no_such_package_anywhere",), "no installed package 'no_such_package_anywhere'"),
        (("{plain}", "--rule", "usmo"), "unknown preset 'usmo' (did you mean 'usmoe'?)"),
        (("{plain}", "--select", "top_x"), "top_x"),
        (("{plain}", "--select", "{broken"), "is not JSON"),
        (("{plain}", "--rule", "usmoe", "-k", "two"), "expected a number"),
        (("{plain}", "--rule", "usmoe", "-k", "9"), "k must lie in (0, number of experts]"),
        (("{plain}", "--rule", "usmoe", "-k", "1,2,3"), "3 budgets were given for 2 routed layers"),
        (("{plain}", "-k", "1.5"), "has no k"),
        (("{plain}", "--rule", "token-choice", "-k", "1.5"), "whole number"),
        (("{plain}", "--rule", "usmoe", "--corpus", "/no/such/text.jsonl"), "/no/such/text.jsonl"),
        (("{plain}", "--rule", "token-choice", "--corpus", "{text}"), "nothing to calibrate"),
        (("{empty}", "--rule", "usmoe"), "holds no saved model"),
        (("{dense}", "--rule", "usmoe"), "has no module with stacked expert weights"),
    ],
)
def test_mistakes_are_one_line(crossways, plain, text, tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    places = {"{plain}": plain, "{text}": text, "{empty}": tmp_path / "empty", "{dense}": tmp_path / "dense"}
    if "{dense}" in arguments:
        save_dense(places["{dense}"], plain)
    code, _, err = crossways("reroute", *(places.get(argument, argument) for argument in arguments))
    assert code == 2, err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line


def save_dense(folder, plain):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(plain).save_pretrained(folder)


def test_a_model_of_crossways_is_refused_with_what_to_do(crossways, tiny, plain, tmp_path):
    from transformers import AutoTokenizer

    tiny(vocab_size=300).save_pretrained(tmp_path / "ours")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "ours")
    code, _, err = crossways("reroute", tmp_path / "ours", "--rule", "usmoe")
    assert code == 2
    assert "routes by crossways already" in err


def test_a_window_that_nobody_asked_for_fits_the_model(crossways, plain, text, tmp_path):
    few = ("--set", "corpus.validation_fraction=0.3")
    folder = tmp_path / "rerouted"
    assert crossways("reroute", plain, "--rule", "usmoe", "--corpus", text, *few, "--out", folder)[0] == 0
    assert crossways("calibrate", folder, "--corpus", text, *few, "--out", folder)[0] == 0
    assert crossways("eval", folder, "--corpus", text, *few)[0] == 0
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["settings"]["evaluation"]["window"] == record["evaluation"]["protocol"]["window"] == 64
    for command in ("reroute", "calibrate", "eval"):
        rule = ("--rule", "usmoe") if command == "reroute" else ()
        out = () if command == "eval" else ("--out", tmp_path / "none")
        asked = (*few, "--set", "evaluation.window=65")
        code, _, err = crossways(command, folder, *rule, "--corpus", text, *asked, *out)
        assert (code, err.count("\n")) == (2, 1)
        assert "--set evaluation.window=64" in err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "command", ["reroute", "calibrate", "upcycle", "finetune", "export", "tune", "study", "train"]
)
def test_a_file_is_no_folder_to_write_to(crossways, plain, tmp_path, command):
    (tmp_path / "file").write_text("kept")
    code, _, err = crossways(command, plain, "--out", tmp_path / "file")
    assert code == 2
    assert "is a file" in err
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", ["eval", "harness", "embed"])
def test_a_folder_is_no_file_to_write_to(crossways, plain, tmp_path, command):
    code, _, err = crossways(command, plain, "--out", tmp_path)
    assert code == 2
    assert "is a directory" in err


def test_a_mistake_is_reported_in_the_name_of_the_command(crossways, plain, text):
    code, _, err = crossways("reroute", plain, "--rule", "usmoe", "--corpus", text, "--set", "corpus.sorce=x")
    assert code == 2
    assert err.startswith("error: crossways reroute: unknown key 'corpus.sorce'")
