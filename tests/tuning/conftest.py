"""Tiny models that look pretrained: their text is sampled from themselves, so on average nothing beats their own
routing. One layer does nothing, so that it can be cut for nothing."""

import copy
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from crossways.evaluation.settings import EvaluationSettings
from crossways.training.corpus import CorpusSettings, load_corpus
from crossways.tuning.settings import TuningSettings

IDLE = 1
"""The layer whose experts return zero."""
VOCABULARY = 40
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def pristine():
    """Three layers of eight experts, four per token; the experts of layer `IDLE` return zero."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(**SIZES)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(3.0)
        model.model.layers[IDLE].mlp.experts.down_proj.zero_()
    return model


@pytest.fixture
def olmoe(pristine):
    """A copy of its own for each test."""
    return copy.deepcopy(pristine)


@pytest.fixture
def qwen():
    """A dense layer in front, then three with a shared expert beside the routed ones."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
        **(SIZES | {"num_hidden_layers": 4}),
    )
    return Qwen2MoeForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tokenizer():
    """One word per token."""
    words = {"<|endoftext|>": 0, "<|padding|>": 1, **{f"w{n}": n for n in range(2, VOCABULARY)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<|padding|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", pad_token="<|padding|>")


@pytest.fixture(scope="session")
def write_corpus(tmp_path_factory):
    """Samples documents from a model into a JSONL file, and gives its path."""

    def write(model, documents=120, words=40):
        torch.manual_seed(1)
        ids_BS = torch.zeros(documents, 1, dtype=torch.long)
        with torch.inference_mode():
            for _ in range(words):
                logits_BV = model(ids_BS).logits[:, -1]
                logits_BV[:, :2] = -torch.inf
                ids_BS = torch.cat([ids_BS, logits_BV.softmax(-1).multinomial(1)], 1)
        path = tmp_path_factory.mktemp("text") / "text.jsonl"
        texts = (" ".join(f"w{token}" for token in row[1:].tolist()) for row in ids_BS)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def corpus_file(write_corpus, pristine):
    return write_corpus(pristine)


@pytest.fixture(scope="session")
def corpus(corpus_file):
    return load_corpus(CorpusSettings(source=str(corpus_file), validation_fraction=0.5), 0)


@pytest.fixture
def settings():
    """Quick, and with nothing timed."""
    return TuningSettings(
        families=("token-choice", "usmoe-threshold"),
        budgets=(1.0, 0.75, 0.5),
        levels=(0.5,),
        calibration_tokens=1_000,
        sensitivity_tokens=1_000,
        tuning_tokens=1_200,
        confirmation_tokens=1_200,
        rounds=0,
    )


@pytest.fixture
def protocol():
    return EvaluationSettings(window=48, batch_size=8)
