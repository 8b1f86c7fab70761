"""Tiny models of transformers and of crossways that share a byte-level tokenizer, and text to calibrate on."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from crossways.calibrate import calibrate
from crossways.evaluation.padding import padded

SENTENCES = (
    "the cat sat on the mat",
    "a dog ran in the park",
    "birds sing at dawn",
    "rain falls on the old roof, twice",
)


@pytest.fixture(scope="session")
def byte_tokenizer():
    """Every byte a token, ids from 2; padding is 1, end of text 0."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, "<|padding|>": 1} | {c: i + 2 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|padding|>",
        clean_up_tokenization_spaces=False,
    )


def family(name):
    shared = {
        "vocab_size": 260,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    if name == "olmoe":
        return OlmoeForCausalLM(OlmoeConfig(**shared, intermediate_size=16)).eval()
    config = Qwen3MoeConfig(**shared, intermediate_size=32, moe_intermediate_size=16, head_dim=16)
    return Qwen3MoeForCausalLM(config).eval()


@pytest.fixture
def build(tiny):
    """Builds a model by name: a family of transformers, or one of our own with USMoE's rule, or a dense one."""

    def make(name):
        ours = {
            "vocab_size": 260,
            "max_position_embeddings": 256,
            "num_experts": 8,
            "pad_token_id": 1,
            "eos_token_id": 0,
        }
        if name == "dense":
            return tiny(**ours, moe_every=0)
        if name == "ours":
            select = {"name": "top_c", "k": 2, "group": "sequence"}
            return tiny(**ours, score={"name": "unified", "alpha": 0.5}, select=select)
        if name == "cartesian":
            return tiny(**ours, layer="cartesian", sharing={"name": "block", "size": 3})
        return family(name)

    return make


@pytest.fixture
def calibrated(byte_tokenizer):
    """Sets the cutoffs of a model's decode twins on a few sentences, and gives the model back."""

    def run(model):
        rows = byte_tokenizer(list(SENTENCES))["input_ids"]
        ids_BS, mask_BS = padded(rows, 1, "right")
        batch = {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100)}
        calibrate(model, [batch])
        return model

    return run


@pytest.fixture
def crossways(monkeypatch, capsys):
    """Run the command in this process: exit code, standard output and error."""
    from crossways import cli

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["crossways", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        out = capsys.readouterr()
        return exit_.value.code or 0, out.out, out.err

    return run
