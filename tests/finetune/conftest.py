"""A tiny routed model of transformers with a tokenizer, saved in a folder, and examples in a file."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

WORDS = [
    "the",
    "a",
    "sum",
    "of",
    "two",
    "numbers",
    "is",
    "adds",
    "list",
    "text",
    "returns",
    "value",
    "print",
    "file",
    "name",
]


@pytest.fixture(scope="session")
def routed_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("routed")
    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", *WORDS, "#", ":", "Instruction", "Response"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def alpaca_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("alpaca") / "alpaca.json"
    rows = [
        {"instruction": f"{a} {b}", "input": "" if i % 2 else f"{b} list", "output": f"returns the {a} of {b}"}
        for i, (a, b) in enumerate((a, b) for a in WORDS[:6] for b in WORDS[6:12])
    ]
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture
def recipe_fields(routed_folder, alpaca_file):
    return {
        "title": "tiny",
        "model": str(routed_folder),
        "rules": {"token-choice": {"rule": "token-choice"}, "usmoe": {"rule": "usmoe"}},
        "examples": {"source": str(alpaca_file), "validation_fraction": 0.2},
        "tuning": {"max_steps": 4, "batch_size": 4, "learning_rate": 1e-2, "max_length": 32, "logging_steps": 1},
    }
