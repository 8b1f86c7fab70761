"""Tiny pretrained-looking models, one layer of which does nothing, and text for them."""

import pytest
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

from crossways.training.corpus import CorpusSettings, load_corpus
from crossways.training.tokenizer import _wrap, train_bpe

IDLE = 1
"""The layer whose experts return zero, so that it can be cut for nothing."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """Eighty short documents in a JSONL file."""
    words = "one two three four five six seven eight nine ten eleven twelve".split()
    draw = torch.Generator().manual_seed(0)
    texts = [" ".join(words[int(i)] for i in torch.randint(12, (40,), generator=draw)) + f" {n}" for n in range(80)]
    path = tmp_path_factory.mktemp("corpus") / "text.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def corpus(corpus_file):
    return load_corpus(CorpusSettings(source=str(corpus_file), validation_fraction=0.5), 0)


@pytest.fixture(scope="session")
def tokenizer(corpus):
    return _wrap(train_bpe(corpus.train, 300))


@pytest.fixture
def olmoe():
    """Three layers of eight experts, four per token; the experts of layer `IDLE` return zero."""
    torch.manual_seed(0)
    model = OlmoeForCausalLM(OlmoeConfig(vocab_size=300, **SIZES)).eval()
    with torch.no_grad():
        model.model.layers[IDLE].mlp.experts.down_proj.zero_()
    return model


@pytest.fixture
def qwen():
    """The same with a shared expert, and a dense layer in front."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=300,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=24,
        mlp_only_layers=[0],
        tie_word_embeddings=True,
        **(SIZES | {"num_hidden_layers": 4}),
    )
    return Qwen2MoeForCausalLM(config).eval()
