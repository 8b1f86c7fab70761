"""Tiny models for the tests of `crossways.models`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM, register

TINY = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,  # large enough that routing differs from token to token
}


@pytest.fixture(autouse=True)
def _registered_and_seeded() -> None:
    register()
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """Builds a tiny configuration; keyword arguments replace fields."""

    def build(**fields: Any) -> CrosswaysConfig:
        return CrosswaysConfig(**(TINY | fields))

    return build


@pytest.fixture
def tiny_model(tiny_config):
    """Builds a tiny model in evaluation mode whose cutoffs are calibrated on one batch."""

    def build(calibrated: bool = True, **fields: Any) -> CrosswaysForCausalLM:
        torch.manual_seed(0)
        model = CrosswaysForCausalLM(tiny_config(**fields))
        if calibrated:
            model.train()(torch.randint(1, 37, (4, 16)))
        return model.eval()

    return build


@pytest.fixture
def tokens():
    """Token ids (3, 9) without padding tokens, and a mask that pads two rows on the left."""
    ids_BS = torch.randint(1, 37, (3, 9), generator=torch.Generator().manual_seed(1))
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :3] = 0
    mask_BS[2, :1] = 0
    return ids_BS, mask_BS
