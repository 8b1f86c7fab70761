"""A tiny routed model, seeded."""

from __future__ import annotations

import pytest
import torch

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM

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
