"""Widths are solved so that sizes are equal, and what cannot be made equal is refused."""

import pytest

from crossways.errors import UserError
from crossways.evaluation.cost import count_parameters
from crossways.models import CrosswaysConfig
from crossways.study.match import Target, solve_widths
from crossways.study.recipe import MatchSettings

BASE = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
REFERENCE = {**BASE, "num_experts": 16, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 96}
LARGE = {
    "hidden_size": 768,
    "vocab_size": 32000,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "moe_every": 2,
    "moe_intermediate_size": 3072,
    "shared_expert_intermediate_size": 3072,
}
BOTH = ("total", "active")
ROUTED = ("moe_intermediate_size", "shared_expert_intermediate_size")
VARIANTS = {
    "fine-grained": {"num_experts": 32, "select": {"name": "top_k", "k": 4}},
    "cartesian": {"layer": "cartesian"},
    "three factors": {"layer": "cartesian", "num_factors": 3},
    "interleaved": {"moe_every": 2},
    "any layers": {"moe_layers": [0, 1]},
    "routed attention": {"attention_experts": 3},
    "rounds": {"distinct_layers": 2, "num_experts": 32},
    "smaller space": {"moe_latent_size": 32, "num_experts": 20},
    "biased experts": {"expert_bias": True, "weights_on": "input"},
    "fractional budget": {"select": {"name": "top_c", "k": 1.5}},
    "shared gates": {"sharing": {"name": "block", "size": 4}},
    "plain activation": {"expert_activation": "gelu"},
}


def counter(fields):
    return lambda widths: count_parameters(CrosswaysConfig(**{**REFERENCE, **fields, **widths}))


def solve(fields, knobs=ROUTED, quantities=BOTH, reference=REFERENCE, **settings):
    size = count_parameters(CrosswaysConfig(**reference))
    config = CrosswaysConfig(**{**REFERENCE, **fields})
    widths = {knob: getattr(config, knob) for knob in knobs}
    target = Target("reference", size, quantities)
    return solve_widths("variant", counter(fields), widths, target, MatchSettings(**settings)), size


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes_come_out_equal(name):
    widths, size = solve(VARIANTS[name])
    got = counter(VARIANTS[name])(widths)
    assert got.total == pytest.approx(size.total, rel=0.01)
    assert got.active == pytest.approx(size.active, rel=0.01)


def test_the_published_designs_have_the_published_widths():
    reference = {**REFERENCE, **LARGE}
    far_off = dict.fromkeys(ROUTED, 512)
    for name, published in (("cartesian", (1536, 1536)), ("fine-grained", (1536, 3072))):
        widths, _ = solve({**LARGE, **far_off, **VARIANTS[name]}, reference=reference)
        # One step less makes up for the larger gates, which the paper leaves as they come.
        assert list(widths.values()) == pytest.approx(published, abs=8), name
        assert all(width % 8 == 0 for width in widths.values())


def test_declared_widths_that_fit_are_kept():
    assert solve({"sharing": {"name": "block", "size": 4}}, multiple_of=1)[0] == dict.fromkeys(ROUTED, 96)


def test_a_dense_model_matches_active_parameters():
    widths, size = solve({"moe_every": 0}, knobs=("intermediate_size",), quantities=("active",))
    got = counter({"moe_every": 0})(widths)
    assert got.active == got.total == pytest.approx(size.active, rel=0.01)
    assert widths == {"intermediate_size": 296}  # 3 x 96, and the gates' share


def test_granularity_yields_to_the_tolerance():
    tight, size = solve(VARIANTS["interleaved"], multiple_of=64, tolerance=0.002)
    got = counter(VARIANTS["interleaved"])(tight)
    assert any(width % 64 for width in tight.values())
    assert got.total == pytest.approx(size.total, rel=0.002)


def test_dense_layers_in_between_count_and_may_be_solved_for():
    # SMoE-Top3 of CartesianMoE: without a shared expert, active parameters are met only by the dense layers' width.
    fields = {"moe_every": 2, "shared_expert_intermediate_size": 0, "select": {"name": "top_k", "k": 3}}
    reference = {**REFERENCE, "moe_every": 2}
    with pytest.raises(UserError, match="cannot be brought"):
        solve(fields, knobs=("moe_intermediate_size",), reference=reference, tolerance=0.005)
    knobs = ("intermediate_size", "moe_intermediate_size")
    widths, size = solve(fields, knobs=knobs, reference=reference, tolerance=0.005)
    got = counter(fields)(widths)
    assert got.total == pytest.approx(size.total, rel=0.005)
    assert got.active == pytest.approx(size.active, rel=0.005)
    assert widths["intermediate_size"] != 96


def test_an_impossible_match_states_both_sizes_and_what_to_change():
    fields = {"num_experts": 4, "select": {"name": "top_k", "k": 4}}
    with pytest.raises(UserError) as caught:
        solve(fields)
    message = str(caught.value)
    size = count_parameters(CrosswaysConfig(**REFERENCE))
    assert f"instead of {size.total / 1e6:.2f}M" in message
    assert f"instead of {size.active / 1e6:.2f}M" in message
    assert "raise num_experts or lower k" in message
    assert "\n" not in message


def test_too_few_active_asks_for_a_greater_k():
    reference = {**REFERENCE, "num_experts": 4, "select": {"name": "top_k", "k": 4}}
    with pytest.raises(UserError, match="lower num_experts or raise k"):
        solve({"num_experts": 16}, knobs=("moe_intermediate_size",), reference=reference)
