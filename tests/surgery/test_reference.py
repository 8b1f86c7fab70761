"""Rerouted layers against the published ones, written down a second time and independently.

Legend: B batch, S sequence, T tokens, D model width, E experts, L layers.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from crossways import reroute
from crossways.evaluation.perplexity import score_batches


def usmoe_weights(logits_SE, budget, alpha=0.5):
    """USMoE's published layer for one sequence: unified score, the best pairs of the sequence, raw weights."""
    experts = logits_SE.shape[1]
    unified_SE = alpha * logits_SE.softmax(-1) + (1 - alpha) * 2 * torch.sigmoid(logits_SE) / experts
    best = unified_SE.flatten().topk(budget).indices
    keep = torch.zeros(unified_SE.numel()).index_fill(0, best, 1.0).view_as(unified_SE)
    return unified_SE * keep


def by_hand(model, weights_of):
    """Replace the forward of every sparse block by a dense loop over experts with the given weights (S, E)."""

    def forward(self, hidden_BSD):
        rows = []
        for x_SD in hidden_BSD:
            logits_SE = functional.linear(x_SD, self.gate.weight).float()
            weight_SE = weights_of(logits_SE)
            y_SD = torch.zeros_like(x_SD)
            for e in range(len(self.gate.weight)):
                gate, up = functional.linear(x_SD, self.experts.gate_up_proj[e]).chunk(2, -1)
                out = functional.linear(functional.silu(gate) * up, self.experts.down_proj[e])
                y_SD = y_SD + weight_SE[:, e, None] * out
            if hasattr(self, "shared_expert"):
                y_SD = y_SD + torch.sigmoid(self.shared_expert_gate(x_SD)) * self.shared_expert(x_SD)
            rows.append(y_SD)
        return torch.stack(rows)

    for layer in model.model.layers:
        layer.mlp.forward = forward.__get__(layer.mlp)


def windows():
    generator = torch.Generator().manual_seed(5)
    batches = []
    for length in (12, 9):
        ids = torch.randint(3, 64, (3, length), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return batches


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "qwen3_moe"])
@pytest.mark.parametrize(("k", "alpha"), [(2, 0.5), (1.5, 0.5), (2, 0.8)])
def test_usmoe_is_the_published_layer(make, name, k, alpha):
    changes = {"norm_topk_prob": False}
    ours, theirs = make(name, **changes), make(name, **changes)
    by_hand(theirs, lambda logits_SE: usmoe_weights(logits_SE, math.floor(k * len(logits_SE) + 0.5), alpha))
    with reroute(ours, "usmoe", score={"name": "unified", "alpha": alpha}, k=k):
        for batch in windows():
            ids = batch["input_ids"]
            with torch.no_grad():
                torch.testing.assert_close(
                    ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-3, atol=1e-4
                )
        measured = score_batches(ours, windows())
    expected = score_batches(theirs, windows())
    assert measured.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    assert measured.budget == pytest.approx(k, abs=0.1)


def test_the_published_layer_is_not_the_familys(make):
    """The comparison above can fail: without rerouting, or with another budget, perplexities differ."""
    plain, theirs = make("olmoe"), make("olmoe")
    by_hand(theirs, lambda logits_SE: usmoe_weights(logits_SE, 2 * len(logits_SE)))
    expected = score_batches(theirs, windows()).perplexity
    assert score_batches(plain, windows()).perplexity != pytest.approx(expected, rel=1e-3)
    with reroute(plain, "usmoe", k=3):
        assert score_batches(plain, windows()).perplexity != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("renormalize", [None, True, False])
def test_top_c_keeps_deepseeks_bias_and_scaling(make, batch, renormalize):
    """Choose by sigmoid plus bias, the best pairs of each sequence; weigh by sigmoid, summing to one, times 2.5."""
    model = make("deepseek_v3")
    inputs = batch("left")
    with reroute(model, "top-c", k=1.5, renormalize=renormalize) as handle:
        with torch.no_grad():
            model(**inputs, use_cache=False)
        for site in handle.blocks:
            gate, routing = site.block.router, site.routing
            assert gate.e_score_correction_bias.abs().max() > 0.1
            score_BSE = routing.logits_TE.sigmoid().view(2, 9, -1)
            for row, mask_S in enumerate(inputs["attention_mask"].bool()):
                choice_SE = (score_BSE[row] + gate.e_score_correction_bias)[mask_S]
                budget = math.floor(1.5 * int(mask_S.sum()) + 0.5)
                chosen_SE = torch.zeros(choice_SE.numel(), dtype=torch.bool)
                chosen_SE[choice_SE.flatten().topk(budget).indices] = True
                weight_SE = score_BSE[row][mask_S] * chosen_SE.view_as(choice_SE)
                if renormalize is not False:  # the family's own way
                    weight_SE = weight_SE / weight_SE.sum(-1, keepdim=True).clamp(min=1e-20)
                got_SE = routing.assignment.to_dense().view(2, 9, -1)[row][mask_S]
                torch.testing.assert_close(got_SE, weight_SE * 2.5)


def test_kolibri_chooses_by_biased_logits(make, batch):
    model = make("kolibri1")
    with reroute(model, "top-c") as handle:
        with torch.no_grad():
            model(**batch())
        site = handle.blocks[0]
        assert site.reading.bias_of_logits
        biased_TE = site.routing.logits_TE + site.block.router.e_score_correction_bias
        for row in range(2):
            mask_SE = site.routing.assignment.to_mask().view(2, 9, -1)[row]
            best = biased_TE.view(2, 9, -1)[row].flatten().topk(18).values
            assert biased_TE.view(2, 9, -1)[row][mask_SE].min() == best[-1]


BY_16_BITS = ["olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "mistral4", "llama4_text"]
BY_16_BITS += ["inkling", "zaya", "dbrx", "jetmoe", "longcat_flash"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", BY_16_BITS)
def test_own_rule_is_the_identity_in_16_bits(make, batch, name, dtype):
    model = make(name).to(dtype)
    inputs = batch("left")
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits
        with reroute(model, "own"):
            assert torch.equal(model(**inputs, use_cache=False).logits, before)
        with reroute(model, "usmoe") as handle:
            after = model(**inputs, use_cache=False).logits
            weights = [site.routing.assignment.weight_P.dtype for site in handle.blocks]
    assert after.dtype == dtype
    assert after[inputs["attention_mask"].bool()].isfinite().all()
    assert set(weights) == {torch.float32}, "decisions are made in float32"
    assert not torch.equal(after, before)


def test_usmoe_in_16_bits_is_near_that_in_32(make, batch):
    wide, narrow = make("olmoe"), make("olmoe").to(torch.bfloat16)
    inputs = batch("right")
    mask = inputs["attention_mask"].bool()
    with reroute(wide, "usmoe"), reroute(narrow, "usmoe"), torch.no_grad():
        a, b = (m(**inputs).logits[mask].float().log_softmax(-1) for m in (wide, narrow))
    assert (a - b).abs().mean() < 0.05


def test_a_budget_for_each_layer(make, batch):
    model = make("olmoe", num_hidden_layers=3)
    with reroute(model, "usmoe", k=[1, 1.5, 3]) as handle:
        with torch.no_grad():
            model(**batch())
        assert [int(load_E.sum()) for load_E in handle.loads()] == [18, 28, 54]  # of 2 x 9 tokens, rounded by row
    with pytest.raises(ValueError, match="2 budgets were given for 3 routed layers"):
        reroute(model, "usmoe", k=[1, 2])


def test_gemmas_logits_are_those_before_its_softmax(make, batch):
    """Its router hands over probabilities; the sigmoid of a unified score needs what they were made of."""
    model = make("gemma4")
    said = []
    hook = model.model.layers[0].router.proj.register_forward_hook(lambda _, args, output: said.append(output))
    with reroute(model, "usmoe") as handle, torch.no_grad():
        model(**batch(), use_cache=False)
        site = handle.blocks[0]
    hook.remove()
    assert site.reading.probabilities
    assert torch.equal(site.routing.logits_TE, said[0])
    assert (site.routing.logits_TE.logsumexp(-1).abs() > 0.1).any(), "these could be log-probabilities"
    scores_TE = 0.5 * said[0].softmax(-1) + 0.5 * 2 * said[0].sigmoid() / 8
    torch.testing.assert_close(site.routing.scores_TE, scores_TE)
    assert not site.block.router.proj._forward_hooks


def test_weights_alone_may_be_asked_for(make, batch):
    """OLMoE with weights that sum to one is the family's own variant; and a factor is one on the experts' output."""
    plain, normalised, inputs = make("olmoe"), make("olmoe_normalised"), batch()
    with torch.no_grad():
        expected, before = normalised(**inputs).logits, plain(**inputs).logits
        with reroute(plain, renormalize=True):
            torch.testing.assert_close(plain(**inputs).logits, expected, rtol=1e-3, atol=1e-4)
        with reroute(plain, weight_scale=0.0) as handle:
            without = plain(**inputs).logits
            assert all(site.routing.assignment.num_pairs == 36 for site in handle.blocks)
        for layer in plain.model.layers:
            layer.mlp.experts.down_proj.zero_()
        torch.testing.assert_close(plain(**inputs).logits, without)
    assert not torch.allclose(before, expected)
    assert not torch.allclose(before, without)
