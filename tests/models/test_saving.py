"""A saved directory loads in a program that never imported crossways, as long as it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import crossways

UNREGISTERED = """
import json, os, sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
assert "crossways" not in sys.modules
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True).eval()
torch.set_num_threads(1)  # as the tests: sums of several threads differ in the last digits
ids, expected = torch.load(path + "/expected.pt")
assert torch.equal(model(ids).logits, expected)
assert model.generate(ids, max_new_tokens=2).shape[1] == ids.shape[1] + 2
assert type(AutoModel.from_pretrained(path, trust_remote_code=True)).__name__ == "CrosswaysModel"
model.save_pretrained(path + "/again")
from crossways.models import CrosswaysForCausalLM
assert type(model) is CrosswaysForCausalLM  # the installed class, not a copy of its source
print(json.dumps(sorted(os.listdir(path + "/again"))))
"""
REGISTERED = """
import os, sys, torch
from transformers import AutoModelForCausalLM
from crossways.models import register
register()
path = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(path).eval()
torch.set_num_threads(1)  # as the tests: sums of several threads differ in the last digits
ids, expected = torch.load(path + "/expected.pt")
assert torch.equal(model(ids).logits, expected)
assert not [name for name in sys.modules if name.startswith("transformers_modules.")]
AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
assert not [name for name in sys.modules if "modeling_crossways" in name]
print("loaded without the pointer")
"""


def run_script(script, path, cache):
    source = str(Path(crossways.__file__).parents[1])
    environment = os.environ | {
        "HF_HOME": str(cache),
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def saved(tiny_model, tokens, path):
    model = tiny_model(
        layer="cartesian", select={"name": "top_c", "k": 1.5}, score="unified", sharing={"name": "block", "size": 2}
    )
    model.save_pretrained(path)
    torch.save((tokens[0], model(tokens[0]).logits), path / "expected.pt")


def test_a_program_that_knows_only_transformers_loads_it(tiny_model, tokens, tmp_path):
    saved(tiny_model, tokens, tmp_path / "model")
    resaved = json.loads(run_script(UNREGISTERED, tmp_path / "model", tmp_path / "cache"))
    assert resaved == ["config.json", "generation_config.json", "model.safetensors", "modeling_crossways.py"]


def test_a_registered_program_runs_no_code_of_the_directory(tiny_model, tokens, tmp_path):
    saved(tiny_model, tokens, tmp_path / "model")
    (tmp_path / "model" / "modeling_crossways.py").write_text("raise RuntimeError('was run')")
    assert "loaded without the pointer" in run_script(REGISTERED, tmp_path / "model", tmp_path / "cache")


def test_the_directory_holds_no_code_but_the_pointer(tiny_model, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    source = (tmp_path / "modeling_crossways.py").read_text()
    assert "from crossways.models import" in source
    assert len(source.splitlines()) <= 6
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_crossways.CrosswaysForCausalLM"
