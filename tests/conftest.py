"""One thread for all tests; synthetic records, cheap and as hostile as a recipe may be; recipes of tiny studies."""

import json
import math

import pytest
import torch
import yaml

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.study.record import (
    CurvePoint,
    DisabledExpert,
    Evaluation,
    ExpertLoad,
    Parameters,
    Protocol,
    RunRecord,
    Training,
)


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tiny tensors gain nothing from threads, and on a machine that others use threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PROTOCOL = Protocol(
    window=64,
    stride=32,
    documents=7,
    tokens=1000,
    bytes=3400,
    boundaries="each document alone",
    dtype="float32",
    batch_size=4,
    experts_backend="grouped",
)


@pytest.fixture(scope="session")
def make_record():
    """A factory of records; `bits` are the honest bits per byte, `leaky` adds a better figure that cheats."""

    def make(variant="moe", seed=0, bits=2.0, leaky=False, dense=False, label=None, **changes):
        evaluation = Evaluation(
            protocol=PROTOCOL,
            perplexity=2 ** (3 * bits) * (0.5 if leaky else 1.0),
            bits_per_byte=bits - (1 / 3 if leaky else 0.0),
            rule="top_c(k=2)" if leaky else "top_k(k=2)",
            leaky=leaky,
            leak_reason="competes with later tokens" if leaky else "",
            causal_perplexity=2 ** (3 * bits) if leaky else None,
            causal_bits_per_byte=bits if leaky else None,
            budget=None if dense else 2.0,
            causal_budget=1.9 if leaky else None,
            disabled=None if dense else DisabledExpert(raw=300.0, renormalized=200.0),
            unigram_bits_per_byte=3.5,
        )
        curve = [CurvePoint(step=s, tokens=64 * s, loss=3 + 4 * math.exp(-s / 5) + bits) for s in range(1, 31)]
        load = (0.4, 0.3, 0.2, 0.1)
        fields = {
            "variant": variant,
            "label": variant if label is None else label,
            "seed": seed,
            "parameters": Parameters(total=1_234_567, active=345_678, router=128),
            "training_flops_per_token": 2.5e6,
            "training": Training(
                steps=30,
                tokens=1920,
                tokens_per_second=1000.0 + seed,
                wall_seconds=60.0,
                peak_memory_bytes=2**29,
                learning_rate=1e-3,
                dtype="float32",
            ),
            "curve": curve,
            "evaluation": evaluation,
            "load_imbalance": None if dense else 1.6,
            "expert_load": () if dense else [ExpertLoad(router=f"layer {i}", load=load) for i in (1, 3)],
            "environment": {"torch": "2.13.0"},
            "recipe_digest": "abc",
        }
        return RunRecord(**(fields | changes))

    return make


# A study small enough to be run in a test.
SENTENCES = ("the cat sat on the mat", "a dog ran in the park", "birds sing at dawn", "rain falls on the old roof")


def tiny_recipe(corpus, **changes):
    recipe = {
        "title": "Tiny <study>",
        "notice": "A test.",
        "corpus": {"source": str(corpus), "validation_fraction": 0.2},
        "tokenizer": {"vocab_size": 270},
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "max_position_embeddings": 64,
            "select": {"name": "top_k", "k": 2},
        },
        "training": {
            "max_steps": 4,
            "sequence_length": 16,
            "batch_size": 2,
            "learning_rate": 0.001,
            "logging_steps": 2,
            "save_steps": 2,
            "report_to": "none",
        },
        "evaluation": {"window": 16, "max_tokens": 200},
        "match": {"reference": "routed", "tolerance": 0.05, "multiple_of": 2},
        "variants": {
            "dense": {"label": "Dense", "model": {"moe_every": 0}},
            "routed": {"label": "Routed", "model": {"select": {"name": "top_c", "k": 2}}},
        },
        "comparisons": [{"title": "Any", "question": "Which?", "variants": ["dense", "routed"], "baseline": "dense"}],
        "seeds": [0, 1],
        "threads": 1,
    }
    for key, value in changes.items():
        *parents, last = key.split("__")
        target = recipe
        for part in parents:
            target = target[part]
        target[last] = value
    return recipe


@pytest.fixture
def tiny_corpus(tmp_path):
    """Forty short documents in a JSONL file."""
    path = tmp_path / "corpus.jsonl"
    texts = [" ".join(SENTENCES[(i + j * (1 + i % 3)) % 4] for j in range(6)) + f" {i}" for i in range(40)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def write_recipe(tmp_path, tiny_corpus):
    """Writes the tiny recipe, with `section__key=value` changes, and gives its path."""

    def write(name="tiny", **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_recipe(tiny_corpus, **changes), sort_keys=False), encoding="utf-8")
        return path

    return write


TINY = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@pytest.fixture
def tiny():
    """Builds a model of three routed layers in evaluation mode; keyword arguments replace fields."""

    def build(**fields):
        torch.manual_seed(0)
        return CrosswaysForCausalLM(CrosswaysConfig(**(TINY | fields))).eval()

    return build


@pytest.fixture
def ids_BS():
    return torch.randint(1, 37, (2, 8), generator=torch.Generator().manual_seed(1))
