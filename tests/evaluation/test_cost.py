"""Counts against the published tables, and operations against torch's own counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crossways.errors import UserError
from crossways.evaluation.cost import (
    count_parameters,
    forward_flops_per_token,
    mean_budget,
    training_flops_per_token,
)
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM

SIZES = {"base": (12, 768, 3072, 12), "large": (24, 1024, 4096, 16)}
DESIGNS = {
    "dense": lambda width: {"moe_every": 0},
    "smoe-share": lambda width: {"moe_intermediate_size": width, "shared_expert_intermediate_size": width},
    "fine-grained": lambda width: {
        "num_experts": 32,
        "select": {"name": "top_k", "k": 4},
        "moe_intermediate_size": width // 2,
        "shared_expert_intermediate_size": width,
    },
    "cartesian": lambda width: {
        "layer": "cartesian",
        "moe_intermediate_size": width // 2,
        "shared_expert_intermediate_size": width // 2,
    },
}
# Millions, CartesianMoE (arXiv 2410.16077), table 1, with one digit more than the paper prints.
PUBLISHED = [
    ("base", "dense", 162.4, 162.4),
    ("large", "dense", 468.2, 468.2),
    ("base", "smoe-share", 842.0, 247.4),
    ("large", "smoe-share", 2884.4, 770.4),
    ("base", "fine-grained", 842.0, 247.5),
    ("large", "fine-grained", 2884.6, 770.6),
    ("base", "cartesian", 842.0, 247.5),
    ("large", "cartesian", 2884.6, 770.6),
]


def published(size, design):
    layers, hidden, width, heads = SIZES[size]
    fields = {"moe_every": 2, **DESIGNS[design](width)}
    return CrosswaysConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **fields,
    )


@pytest.mark.parametrize(("size", "design", "total", "active"), PUBLISHED)
def test_counts_are_those_of_the_published_table(size, design, total, active):
    counts = count_parameters(published(size, design))
    assert round(counts.total / 1e6, 1) == total
    assert round(counts.active / 1e6, 1) == active


def tiny(**fields):
    defaults = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_experts": 8,
        "moe_intermediate_size": 12,
        "experts_backend": "naive",
        "attn_implementation": "eager",
    }
    return CrosswaysConfig(**{**defaults, **fields})


VARIANTS = {
    "dense": {"moe_every": 0},
    "moe": {},
    "interleaved": {"moe_every": 2},
    "any layers": {"moe_layers": [0, 3], "sharing": {"name": "block", "size": [1, 1]}},
    "routed attention": {"attention_experts": 4, "attention_select": {"name": "top_k", "k": 3}},
    "routed keys in rounds": {
        "attention_experts": 3,
        "attention_projections": ["key"],
        "distinct_layers": 2,
        "moe_every": 0,
        "head_dim": 6,
    },
    "rounds": {
        "distinct_layers": 2,
        "sharing": {"name": "decision", "size": 2},
        "shared_expert_intermediate_size": 4,
    },
    "rounds of a cartesian layer": {"distinct_layers": 1, "layer": "cartesian", "moe_latent_size": 6},
    "dense rounds": {"distinct_layers": 2, "moe_layers": [1, 3]},
    "latent": {"moe_latent_size": 6, "shared_expert_intermediate_size": 5},
    "latent cartesian": {"moe_latent_size": 6, "layer": "cartesian"},
    "expert bias": {"expert_bias": True},
    "weighted inputs": {"weights_on": "input", "moe_latent_size": 6},
    "shared expert": {"shared_expert_intermediate_size": 20},
    "cartesian": {"layer": "cartesian", "num_factors": 3, "shared_expert_intermediate_size": 4},
    "shared gates": {"sharing": {"name": "block", "size": 3}},
    "fractional budget": {"select": {"name": "top_c", "k": 1.5}},
    "expert choice": {"select": {"name": "expert_choice", "k": 2}},
    "plain activation": {"expert_activation": "relu"},
    "balanced": {"load_balance_coef": 0.01, "router_z_loss_coef": 0.001},
    "tied": {"tie_word_embeddings": True},
}


def counted(counter):
    """All but the rotary tables, whose angles some versions of transformers make by a matrix product."""
    tables = [flops for name, flops in counter.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(sum(flops.values()) for flops in tables)


@pytest.mark.parametrize("name", VARIANTS)
def test_training_operations_equal_those_torch_counts(name):
    batch, sequence = 2, 16
    config = tiny(**VARIANTS[name])
    model = CrosswaysForCausalLM(config).train()
    ids = torch.randint(0, 64, (batch, sequence))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert counted(counter) == training_flops_per_token(config, sequence) * batch * sequence


GATES = {
    "cosine": {"gate": "cosine"},
    "decision": {"sharing": {"name": "decision", "size": 2}},
    "hash": {"gate": "hash"},
    "low rank": {"gate": "low_rank", "sharing": "all"},
    "noisy": {"gate": "noisy"},
    "random": {"gate": "random"},
    "recurrent": {"gate": {"name": "recurrent", "state_size": 6}, "sharing": {"name": "block", "size": [1, 3]}},
    "stable": {"gate": {"name": "stable", "freeze_after": 5}},
}


@pytest.mark.parametrize("name", GATES)
def test_forward_operations_of_every_gate_equal_those_torch_counts(name):
    batch, sequence = 2, 16
    config = tiny(**GATES[name])
    model = CrosswaysForCausalLM(config).train(name == "noisy")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.randint(0, 64, (batch, sequence)))
    assert counted(counter) == forward_flops_per_token(config, sequence) * batch * sequence


def test_a_scheduled_budget_counts_as_what_it_arrives_at():
    assert mean_budget(tiny(select={"name": "scheduled_top_k", "k": 1, "k_end": 6, "steps": 9})) == 6.0


def test_forward_operations_are_a_third():
    config = tiny()
    assert forward_flops_per_token(config, 16) * 3 == training_flops_per_token(config, 16)


def test_active_leaves_out_only_skipped_experts():
    config = tiny(num_experts=8, select={"name": "top_c", "k": 0.5})
    expert = 3 * 16 * 12
    counts = count_parameters(config)
    assert counts.total - counts.active == round(4 * (8 - 0.5) * expert)
    assert mean_budget(config) == 0.5


def test_a_smaller_space_and_biases_by_hand():
    fields = {"num_experts": 8, "select": {"name": "top_k", "k": 2}, "moe_layers": [0, 1, 3]}
    plain = count_parameters(tiny(**fields))
    small = count_parameters(tiny(**fields, moe_latent_size=6, expert_bias=True))
    # Three routed layers: two projections between 16 and 6; experts of 3 * 12 rows of 6 in place of 16, with biases.
    expert, smaller = 3 * 12 * 16, 3 * 12 * 6 + 2 * 12 + 6
    assert small.total - plain.total == 3 * (2 * 16 * 6 + 8 * (smaller - expert))
    assert small.active - plain.active == 3 * (2 * 16 * 6 + 2 * (smaller - expert))
    assert small.router == plain.router == 3 * 8 * 16


def test_layers_that_are_gone_through_again_count_once_and_take_other_experts():
    fields = {"num_experts": 8, "select": {"name": "top_k", "k": 3}}
    once, twice = (
        count_parameters(tiny(num_hidden_layers=2, **fields)),
        count_parameters(tiny(distinct_layers=2, **fields)),
    )
    expert = 3 * 16 * 12
    assert twice.total == once.total
    assert twice.active - once.active == 2 * (6 - 3) * expert  # two layers, each with up to 6 of its 8 experts
    often = count_parameters(tiny(distinct_layers=1, **fields))
    assert often.active == often.total


def test_routed_attention_by_hand():
    fields = {"num_experts": 8, "select": {"name": "top_k", "k": 2}}
    plain, routed = (count_parameters(tiny(**fields, **more)) for more in ({}, {"attention_experts": 4}))
    # Four layers; heads of width 8: one with values, two with outputs. Four matrices for one, two of them taken.
    value, output, gates = 16 * 8, 2 * 8 * 16, (1 + 2) * 4 * 16
    assert routed.total - plain.total == 4 * (3 * (value + output) + gates)
    assert routed.active - plain.active == 4 * (1 * (value + output) + gates)
    assert routed.router - plain.router == 4 * gates
    once, twice = (count_parameters(tiny(**fields, attention_experts=4, distinct_layers=n)) for n in (4, 2))
    assert once == routed
    all_of_them = count_parameters(tiny(**fields, distinct_layers=2)).active + 2 * (3 * (value + output) + gates)
    assert twice.active == all_of_them  # two rounds of two experts of four


def test_shared_gates_count_once():
    own, shared = count_parameters(tiny()), count_parameters(tiny(sharing={"name": "block", "size": 4}))
    assert own.router == 4 * 8 * 16
    assert shared.router == 8 * 16
    assert own.total - shared.total == own.router - shared.router


def test_embeddings_are_included_and_told_apart():
    counts, tied = count_parameters(tiny()), count_parameters(tiny(tie_word_embeddings=True))
    assert counts.total - counts.total_non_embedding == 2 * 64 * 16
    assert tied.total - tied.total_non_embedding == 64 * 16
    assert counts.active_non_embedding == tied.active_non_embedding


def test_counts_equal_those_of_the_real_model():
    config = tiny(**VARIANTS["cartesian"])
    assert count_parameters(config).total == CrosswaysForCausalLM(config).num_parameters()


def test_a_fixed_threshold_has_no_budget_to_count():
    with pytest.raises(UserError, match="depends on the text"):
        count_parameters(tiny(select={"name": "threshold", "value": 0.2}))
