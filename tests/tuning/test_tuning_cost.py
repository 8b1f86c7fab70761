"""Counted FLOPs against those that torch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from crossways.evaluation.subject import subject_of
from crossways.surgery.reroute import reroute
from crossways.tuning.cost import pair_costs


def counted(model):
    """Executed pairs of each layer, and FLOPs of all matrix products."""
    ids = torch.arange(2, 32).reshape(1, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _, loads = subject_of(model).run(batch, causal=False)
    return [int(load_E.sum()) for load_E in loads], counter.get_total_flops()


@pytest.mark.parametrize("name", ["olmoe", "qwen"])
def test_what_a_smaller_budget_saves_is_what_torch_counts(name, request):
    model = request.getfixturevalue(name)
    model.set_experts_implementation("eager")  # whose products torch can count
    costs = pair_costs(model)
    seen = []
    for rule in ({"rule": "own"}, {"rule": "usmoe", "k": 1.5}, {"select": "top_k", "k": [1, 3, 2]}):
        with reroute(model, **rule):
            seen.append(counted(model))
    base_pairs, base_flops = seen[0]
    for pairs, flops in seen[1:]:
        saved = sum(c * (b - p) for c, b, p in zip(costs.pair_L, base_pairs, pairs, strict=True))
        assert saved > 0
        assert base_flops - flops == saved


@pytest.mark.parametrize("name", ["olmoe", "qwen"])
def test_the_rest_is_all_but_experts_and_attentions_products(name, request):
    model = request.getfixturevalue(name)
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")  # likewise
    costs = pair_costs(model)
    with reroute(model, "own"):
        pairs, flops = counted(model)
    experts = sum(c * p for c, p in zip(costs.pair_L, pairs, strict=True))
    config = model.config
    attention = 4 * 30 * 30 * config.hidden_size * config.num_hidden_layers
    assert flops == experts + 30 * costs.rest + attention


def test_the_cost_of_a_token_weighs_layers_by_their_pairs(olmoe):
    costs = pair_costs(olmoe)
    assert costs.pair_L == (2 * 3 * 32 * 16,) * 3
    assert costs.per_token((4.0, 0.5, 1.5)) == 6.0 * costs.pair_L[0]
