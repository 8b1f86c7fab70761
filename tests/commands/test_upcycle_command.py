"""`crossways upcycle`, and training that starts from what it wrote."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from crossways import cli
from crossways.models.checkpoint import load_checkpoint
from crossways.training.corpus import CorpusSettings, load_corpus
from crossways.training.tokenizer import TokenizerSettings, load_tokenizer


@pytest.fixture
def crossways(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["crossways", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "160")
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out = capsys.readouterr()
        return exit_.value.code or 0, out.out, out.err

    return run


@pytest.fixture
def dense_folder(tiny_corpus, tmp_path):
    """A tiny Llama with the tokenizer of the tiny corpus."""
    corpus = load_corpus(CorpusSettings(source=str(tiny_corpus)), 0)
    tokenizer = load_tokenizer(TokenizerSettings(vocab_size=270), corpus, tmp_path / "cache")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=270,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def test_the_command_writes_a_model_and_says_what_it_is(crossways, dense_folder, tmp_path):
    out = tmp_path / "moe"
    code, said, _ = crossways("upcycle", dense_folder, "--out", out, "--experts", "4", "--granularity", "2")
    assert code == 0
    assert "the same function: by construction" in said
    record = json.loads((out / "upcycle.json").read_text(encoding="utf-8"))
    assert record["same_function"]
    assert record["greatest_logit_difference"] < 2e-5 < record["logit_deviation"]
    assert record["routing"]["select"] == {"name": "top_k", "k": 2}
    model, tokenizer = load_checkpoint(out)
    assert (model.config.num_experts, model.config.moe_intermediate_size) == (4, 12)
    dense = LlamaForCausalLM.from_pretrained(dense_folder)
    text = "the cat sat on the mat"
    assert tokenizer(text).input_ids == AutoTokenizer.from_pretrained(dense_folder)(text).input_ids
    ids_BS = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BS).logits, dense(ids_BS).logits, atol=2e-5, rtol=1e-4)


def test_another_function_is_said_so(crossways, dense_folder, tmp_path):
    code, said, _ = crossways(
        "upcycle", dense_folder, "--out", tmp_path / "moe", "--set", "select={name: expert_choice, k: 1}"
    )
    assert code == 0
    assert "the same function: no, under selection 'expert_choice' a token may go without an expert" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--neurons", "kmean"], "neurons = 'kmean' is not accepted"),
        (["--set", "num_expert=4"], "'num_experts'"),
        (["--set", "hidden_size=4"], "hidden_size follows from the dense model"),
        (["--granularity", "3"], "num_experts = 8 is no multiple of granularity = 3"),
        (["--gguf", "absent.gguf"], "no such file"),
    ],
)
def test_mistakes_are_one_line(crossways, dense_folder, tmp_path, arguments, words):
    code, _, err = crossways("upcycle", dense_folder, "--out", tmp_path / "moe", *arguments)
    assert code == 2
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "moe").exists()


def test_an_occupied_folder_is_left_alone(crossways, dense_folder):
    code, _, err = crossways("upcycle", dense_folder, "--out", dense_folder)
    assert code == 2
    assert "is not empty" in err


@pytest.fixture
def started(crossways, dense_folder, write_recipe, tmp_path):
    """A recipe whose training starts from the upcycled model, and the folder of that."""
    start = tmp_path / "start"
    crossways("upcycle", dense_folder, "--out", start, "--experts", "4", "--granularity", "2")
    changes = {
        "model": {"load_balance_coef": 0.01},
        "tokenizer": {"name": str(start)},
        "init_from": str(start),
        "variants": {"kept": {}, "other_gate": {"model": {"gate": "cosine", "num_experts": 4}}},
        "comparisons": [],
        "match__reference": "kept",
        "seeds": [0],
        "training__learning_rate": 1e-12,
    }
    return write_recipe(**changes), start


def test_training_starts_from_the_saved_model(crossways, started, tmp_path):
    recipe, start = started
    code, _, err = crossways("study", recipe, "--out", tmp_path / "runs")
    assert (code, err) == (0, "")
    before, _ = load_checkpoint(start)
    after, _ = load_checkpoint(tmp_path / "runs/kept/seed-0/model")
    for name, weight in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], weight, atol=1e-7, rtol=0)
    assert after.config.load_balance_coef == 0.01
    other, _ = load_checkpoint(tmp_path / "runs/other_gate/seed-0/model")
    assert other.config.gate["name"] == "cosine"
    experts = "model.layers.0.mlp.experts.down_proj"
    torch.testing.assert_close(other.state_dict()[experts], before.state_dict()[experts], atol=1e-7, rtol=0)
    settings = json.loads((tmp_path / "runs/kept/seed-0/settings.json").read_text(encoding="utf-8"))
    assert settings["init_from"]["folder"] == str(start)


def test_a_changed_start_is_noticed(crossways, started, tmp_path):
    recipe, start = started
    assert crossways("train", recipe, "--variant", "kept", "--out", tmp_path / "runs")[0] == 0
    model, _ = load_checkpoint(start)
    model.model.norm.weight.data *= 2
    model.save_pretrained(start)
    code, _, err = crossways("train", recipe, "--variant", "kept", "--out", tmp_path / "runs")
    assert code == 2
    assert "init_from.weights was" in err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["tokenizer={}"], "set tokenizer.name"),
        (["init_from=nowhere"], "nowhere holds no saved model"),
        (["init_from={dense}"], "holds a 'llama' model; `crossways upcycle` converts it"),
        (["model.num_experts=3"], "do not fit the model"),
        (["model.shared_expert_intermediate_size=4"], "lacks model.layers.0.mlp.shared_expert.down_proj.weight"),
    ],
)
def test_a_start_that_does_not_fit(crossways, started, dense_folder, tmp_path, overrides, words):
    recipe, _ = started
    sets = [part for text in overrides for part in ("--set", text.replace("{dense}", str(dense_folder)))]
    code, _, err = crossways("train", recipe, "--variant", "kept", "--out", tmp_path / "runs", *sets)
    assert code == 2
    assert words in err
