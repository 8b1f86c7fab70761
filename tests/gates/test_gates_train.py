"""Every baseline trains: two hundred steps on a toy language, with the idle experts of each reported."""

from __future__ import annotations

import math

import pytest
import torch

from crossways.models import CrosswaysConfig, CrosswaysForCausalLM

VOCAB, STEPS, LAYERS, EXPERTS = 32, 200, 4, 8
BALANCE = {"load_balance_coef": 0.01}
BASELINES = {
    "Indep-MoE": BALANCE,
    "Rand-MoE": {"gate": "random"},
    "X-MoE": {"gate": "cosine"} | BALANCE,
    "PathB2-MoE": {"sharing": {"name": "block", "size": 2}},
    "PathB2X-MoE": {"gate": "cosine", "sharing": {"name": "block", "size": 2}},
    "unequal blocks": {"sharing": {"name": "block", "size": [1, 3]}},
    "LowRank-MoE": {"gate": {"name": "low_rank", "rank": 4}, "sharing": "all"},
    "Recurrent-MoE": {"gate": {"name": "recurrent", "state_size": 16}, "sharing": "all", "renormalize": True}
    | BALANCE,
    "MonoB2-MoE": {"sharing": {"name": "decision", "size": 2}} | BALANCE,
    "Hash Layer": {"gate": "hash", "shared_expert_intermediate_size": 32},
    "noisy top-k": {"gate": "noisy", "renormalize": True} | BALANCE,
    "XMoE of USMoE": {
        "gate": {
            "name": "cosine",
            "dim": 8,
            "temperature": 1.0,
            "learn_temperature": False,
            "normalize_input": False,
            "embedding_norm": 1.5,
        }
    }
    | BALANCE,
    "StableMoE": {
        "gate": {"name": "stable", "freeze_after": 60},
        "score": "sigmoid",
        "select": {"name": "top_k", "k": 1},
    }
    | BALANCE,
    "SMoE-Dropout": {
        "gate": "random",
        "select": {"name": "scheduled_top_k", "k": 1, "k_end": EXPERTS, "steps": STEPS},
        "renormalize": True,
    },
}


def toy_batch(generator, rows=16, length=24):
    """A token is followed by seven times itself plus one of two numbers, modulo V: one bit per token to learn."""
    ids = [torch.randint(VOCAB, (rows,), generator=generator)]
    for _ in range(length - 1):
        ids.append((7 * ids[-1] + 3 * torch.randint(2, (rows,), generator=generator)) % VOCAB)
    return torch.stack(ids, dim=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_learns(name, record_property):
    torch.manual_seed(0)
    config = CrosswaysConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_experts=EXPERTS,
        moe_intermediate_size=32,
        max_position_embeddings=32,
        **BASELINES[name],
    )
    model, generator = CrosswaysForCausalLM(config).train(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    losses, loads = [], []
    for _ in range(STEPS):
        ids_BS = toy_batch(generator)
        output = model(ids_BS, labels=ids_BS)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(output.lm_loss.item())
        loads.append(torch.stack(output.expert_load))
    idle = int((torch.stack(loads[-20:]).sum(0) == 0).sum())
    last = sum(losses[-20:]) / 20
    record_property("idle_experts", f"{idle} of {LAYERS * EXPERTS}")
    print(f"{name:16} {losses[0]:.3f} -> {last:.3f}, idle experts in the last 20 steps: {idle} of {LAYERS * EXPERTS}")
    assert all(map(math.isfinite, losses))
    assert losses[0] > 3.4  # log 32 = 3.47
    assert last < 0.9  # the unavoidable bit is log 2 = 0.69
