"""Perturbing and tracing models of transformers, rerouted and as they are."""

from __future__ import annotations

import pytest
import torch

from crossways import reroute
from crossways.perturb import DisableTop, DropExperts, LogitNoise, perturbed
from crossways.surgery.handle import handle_of
from crossways.surgery.sparsemixer import sparsemixer_weights
from crossways.trace import TraceSettings, traced

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss", "phimoe", "lfm2_moe", "llama4_text", "qwen3_vl_moe", "deepseek_v4"]


@pytest.fixture(params=FAMILIES)
def model(request, make):
    return make(request.param)


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs, use_cache=False)[0]


def test_a_plain_model_is_watched_without_preparation(model, batch):
    inputs = batch("left")
    before = logits_of(model, inputs)
    with traced(model, TraceSettings(keep_tokens=4)) as trace:
        assert torch.equal(logits_of(model, inputs), before)
    assert handle_of(model) is None
    tokens = int(inputs["attention_mask"].sum())
    assert trace.num_tokens == tokens
    assert (trace.load_RE.sum(1) == 2 * tokens).all()
    with perturbed(model, DisableTop()), traced(model, TraceSettings(keep_tokens=4)) as disturbed:
        after = logits_of(model, inputs)
    assert handle_of(model) is None
    assert not torch.allclose(after, before)
    assert torch.equal(logits_of(model, inputs), before)
    assert (disturbed.load_RE.sum(1) == 2 * tokens).all()
    top_N = trace.kept_weight_NRE[:, 0].argmax(-1)  # the first router sees undisturbed states
    if type(model).__name__ != "PhimoeForCausalLM":  # whose two weights may be equal
        assert not disturbed.kept_mask_NRE[range(len(top_N)), 0, top_N].any(), "the top expert was executed"


@pytest.mark.parametrize("preset", ["usmoe", "top-c", "token-choice", "usmoe-threshold"])
def test_a_rerouted_model_is_watched_as_it_routes(model, batch, preset):
    inputs = batch("right")
    with reroute(model, preset) as handle:
        if preset == "usmoe-threshold":
            handle.set_estimates([{"cutoff": [0.2]}] * len(handle.blocks))
        before = logits_of(model, inputs)
        with traced(model) as trace:
            logits_of(model, inputs)
        assert trace.load_RE.tolist() == [load_E.tolist() for load_E in handle.loads()]
        for perturbation in (DisableTop(), LogitNoise(1.0), DropExperts(0.25)):
            with perturbed(model, perturbation):
                assert not torch.allclose(logits_of(model, inputs), before), perturbation
        assert torch.equal(logits_of(model, inputs), before)
        assert handle_of(model) is handle


def test_a_failure_inside_leaves_the_model_as_it_was(make, batch):
    model = make("olmoe")
    before = logits_of(model, batch())
    with pytest.raises(KeyError), perturbed(model, DisableTop()):
        raise KeyError
    assert handle_of(model) is None
    assert torch.equal(logits_of(model, batch()), before)


def test_a_refused_family_says_why(make):
    model = make("olmoe")
    gate = model.model.layers[1].mlp.gate
    kind = type(gate)
    squared = {"forward": lambda self, x: (lambda said: (said[0], said[1] ** 2, said[2]))(kind.forward(self, x))}
    gate.__class__ = type(kind.__name__, (kind,), squared)
    with pytest.raises(ValueError, match="none of the"), traced(model):
        pass


def test_phimoe_weighs_the_next_experts_as_it_would(make, batch):
    """Without one of its two experts, SparseMixer weighs the other and the third."""
    model = make("phimoe")
    with perturbed(model, DisableTop()):
        logits_of(model, batch())
        site = handle_of(model).blocks[0]
        routing = site.routing
    logits_TE, executed_TE = routing.logits_TE, routing.assignment.to_mask()
    best_TE = torch.zeros_like(executed_TE).scatter(-1, logits_TE.topk(2).indices, True)
    disabled_TE = best_TE & ~executed_TE
    assert (disabled_TE.sum(-1) == 1).all()
    logits_TE = logits_TE.masked_fill(disabled_TE, -torch.inf)
    expected_T2 = sparsemixer_weights(logits_TE, site.reading.weighs_eps)
    weight_T2 = routing.assignment.to_dense().gather(-1, logits_TE.topk(2).indices)
    torch.testing.assert_close(weight_T2, expected_T2)
