"""docs/downstream.md, followed to the letter: its files are written, its commands and programs run, offline."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from crossways import cli
from crossways.evaluation.embeddings.record import EmbeddingRecord
from crossways.evaluation.executed import RoutingRecord
from crossways.evaluation.harness.record import HarnessRecord

for _module in ("lm_eval", "mteb", "sentence_transformers"):
    pytest.importorskip(_module, reason=f"the extra `eval` is not installed: {_module}")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "downstream.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the page's files, some text, and a tiny OLMoE as `$MODEL`."""
    folder = tmp_path_factory.mktemp("page")
    for _, body in BLOCKS:
        if body.startswith("# file: "):
            head, rest = body.split("\n", 1)
            (folder / head.removeprefix("# file: ")).write_text(rest, encoding="utf-8")
    texts = [f"The cat number {n} sat on a mat." for n in range(40)]
    (folder / "text.txt").write_text("\n".join(texts))
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder / "model")
    torch.manual_seed(0)
    size = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "eos_token_id": 0}
    config = OlmoeConfig(**size, num_attention_heads=2, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2)
    OlmoeForCausalLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "200")
    return place


COMMANDS = [line for language, body in BLOCKS if language == "sh" for line in body.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(here, monkeypatch, capsys, command):
    program, *arguments = shlex.split(command.replace("$MODEL", "model"))
    assert program == "crossways"
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    out = capsys.readouterr()
    assert exit_.value.code in (0, None), out.err
    assert ("(leaky)" in out.out) == ("--leaky" in command)
    if "--out" in arguments:
        record = json.loads((here / arguments[arguments.index("--out") + 1]).read_text())
        kind = HarnessRecord if "harness" in arguments else EmbeddingRecord
        assert kind.model_validate(record).routing.rule.startswith("top_c(k=2")
        assert not any(str(ROOT) in text or str(here) in text for text in [json.dumps(record["routing"])])


@pytest.mark.parametrize("program", ["in_memory.py", "sentences.py"])
def test_every_program_runs(here, monkeypatch, capsys, program):
    monkeypatch.setattr(sys, "argv", [program, "model"])
    runpy.run_path(program)
    said = capsys.readouterr().out
    assert ("top_k(k=2) of softmax() 2.0" in said) if program == "in_memory.py" else said.startswith("(2, 24)")


def test_the_page_names_what_exists():
    assert len(COMMANDS) == 8
    for path in re.findall(r"`(src/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"`routing\.(\w+)`", PAGE):
        assert name in RoutingRecord.model_fields
