"""Calibration: the budget that comes out, layer by layer consistency, and what is left untouched."""

from __future__ import annotations

import pytest
import torch

from crossways.calibrate import calibrate
from crossways.errors import UserError
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.routing import Context
from crossways.trace import traced

TOP_C = {"name": "top_c", "k": 1.5}


def tiny(**fields):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 37,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "select": TOP_C,
    }
    return CrosswaysForCausalLM(CrosswaysConfig(**(sizes | fields))).eval()


def batches(count=4, seed=0, padded=True):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids_BS = torch.randint(1, 37, (3, 16), generator=generator)
        mask_BS = torch.ones_like(ids_BS)
        if padded:
            mask_BS[1, 11:] = 0
        made.append(
            {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100)}
        )
    return made


def budgets_under_twin(model, text):
    with traced(model) as trace:
        for batch in text:
            model(batch["input_ids"], attention_mask=batch["attention_mask"], causal_routing=True)
    return (trace.load_RE.sum(1) / trace.num_tokens).tolist()


def test_router_by_router_the_budget_is_exact():
    """Three routers: two passes under the twin make all of them consistent; 172 tokens and k = 1.5 give 258 pairs."""
    model = tiny()
    report = calibrate(model, batches(), passes=2)
    assert report.tokens == 4 * (16 + 11 + 16)
    for router, spent in zip(report.routers, budgets_under_twin(model, batches()), strict=True):
        assert router.twin == pytest.approx(spent)
        assert router.twin == pytest.approx(1.5, abs=1e-9)
        assert router.original == pytest.approx(1.5, abs=0.02)  # rounded in each sequence
        assert router.rounding == 0
    assert [router.router for router in report.routers] == ["layer 1", "layer 2", "layer 3"]


def test_under_the_original_rule_only_the_first_router_is_exact():
    model = tiny()
    calibrate(model, batches(), passes=0)
    first, *later = budgets_under_twin(model, batches())
    assert first == pytest.approx(1.5, abs=1e-9)
    assert any(abs(spent - 1.5) > 1e-3 for spent in later)
    calibrate(model, batches(), passes=1)
    first, second, _ = budgets_under_twin(model, batches())
    assert (first, second) == pytest.approx((1.5, 1.5), abs=1e-9)


def test_the_first_pass_takes_the_greatest_scores_of_the_original_rule():
    model = tiny()
    text = batches(1, padded=False)
    calibrate(model, text, passes=0)
    for router, routing in zip(
        model.model.routers, model(text[0]["input_ids"], output_routings=True).routings, strict=True
    ):
        kth = routing.scores_TE.detach().flatten().sort(descending=True).values[72 - 1]  # 1.5 x 48
        assert float(router.cutoff) == float(kth)


def test_expert_choice_has_a_cutoff_for_each_expert():
    model = tiny(select={"name": "expert_choice", "k": 1.0})
    report = calibrate(model, batches(), passes=2)
    assert all(router.cutoff.shape == (4,) for router in model.model.routers)
    with traced(model) as trace:
        for batch in batches():
            model(batch["input_ids"], attention_mask=batch["attention_mask"], causal_routing=True)
    assert trace.load_RE.tolist() == [[43] * 4] * 3  # 172 tokens / 4 experts
    assert [router.twin for router in report.routers] == [1.0] * 3


def test_biased_choices_are_calibrated_as_they_are_compared():
    model = tiny(score="sigmoid", bias_update_rate=0.1)
    for router in model.model.routers:
        router.bias.copy_(torch.tensor([0.5, -0.5, 0.0, 0.2]))
    report = calibrate(model, batches(), passes=2)
    assert [router.twin for router in report.routers] == pytest.approx([1.5] * 3)


def test_a_threshold_from_the_start_needs_no_training():
    model = tiny(select={"name": "threshold", "k": 1.5})
    report = calibrate(model, batches(), passes=2)
    assert [router.twin for router in report.routers] == pytest.approx([1.5] * 3)
    assert not any(module.training for module in model.modules())


def test_short_memory_still_states_its_error():
    model = tiny(num_hidden_layers=1)
    report = calibrate(model, batches(), passes=0, limit=8)
    router = report.routers[0]
    assert router.rounding > 0
    assert abs(router.twin - 1.5) == pytest.approx(router.rounding)


def test_the_checkpoint_holds_the_cutoffs_and_generation_uses_them(tmp_path):
    model = tiny()
    calibrate(model, batches())
    model.save_pretrained(tmp_path)
    loaded = CrosswaysForCausalLM.from_pretrained(tmp_path)
    for mine, theirs in zip(model.model.routers, loaded.model.routers, strict=True):
        assert torch.equal(mine.cutoff, theirs.cutoff)
    ids_BS = torch.ones(1, 3, dtype=torch.int64)
    generated = loaded.generate(ids_BS, max_new_tokens=3, do_sample=False)
    assert torch.equal(generated, model.generate(ids_BS, max_new_tokens=3, do_sample=False))


def test_perplexities_are_those_of_the_checked_text():
    from crossways.evaluation.perplexity import score_batches

    model, other = tiny(), batches(2, seed=9)
    report = calibrate(model, batches(), check=other)
    assert report.original_perplexity == score_batches(model, other).perplexity
    assert report.twin_perplexity == score_batches(model, other, causal=True).perplexity
    assert report.twin_perplexity != report.original_perplexity


def test_models_without_a_cutoff_and_empty_text_are_refused_and_nothing_changes():
    with pytest.raises(UserError, match="nothing to calibrate"):
        calibrate(tiny(select={"name": "top_k", "k": 2}), batches())
    model = tiny()
    empty = [{name: torch.zeros_like(tensor) for name, tensor in batches(1)[0].items()}]
    for wrong in ([], empty):
        with pytest.raises(ValueError, match=r"no tokens|0 of 0"):
            calibrate(model, wrong)
    with pytest.raises(UserError, match="0 or more"):
        calibrate(model, batches(), passes=-1)
    assert all(router.cutoff.isnan().all() for router in model.model.routers)
    assert not any(router._forward_hooks or router._forward_pre_hooks for router in model.model.routers)


def test_a_failure_half_way_restores_the_cutoffs():
    model = tiny()
    calibrate(model, batches())
    kept = [router.cutoff.clone() for router in model.model.routers]
    broken = [*batches(1, seed=3), {name: tensor + 1000 for name, tensor in batches(1)[0].items()}]
    with pytest.raises(IndexError):
        calibrate(model, batches(2, seed=5), check=broken)
    assert all(torch.equal(router.cutoff, old) for router, old in zip(model.model.routers, kept, strict=True))


def test_the_table_names_routers_and_both_perplexities():
    from rich.console import Console

    report = calibrate(tiny(layer="cartesian"), batches())
    console = Console(width=120, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    text = console.export_text()
    assert "layer 1 / factor 2" in text
    assert f"{report.twin_perplexity:.4g}" in text


def test_training_after_calibration_goes_on_from_it():
    model = tiny()
    calibrate(model, batches())
    router = model.model.routers[0]
    kept_C = router.cutoff.clone()
    model.train()(batches(1)[0]["input_ids"])
    assert not torch.equal(router.cutoff, kept_C)
    assert router(torch.randn(1, 2, 16), Context(gate=model.model.gates[0], causal=True)).assignment.num_tokens == 2


def test_a_score_normalised_over_tokens_gets_its_normaliser():
    """One router, so its logits never change: c[e] = log mean exp over all tokens, and then the cutoff is exact."""
    score = {"name": "unified", "alpha": 0.5, "expert_part": "softmax_over_tokens"}
    model, text = tiny(num_hidden_layers=1, score=score), batches()
    report = calibrate(model, text, passes=1)
    logits = [
        model(batch["input_ids"], attention_mask=batch["attention_mask"], output_routings=True).routings[0]
        for batch in text
    ]
    pooled_TE = torch.cat([routing.logits_TE[routing.valid_T] for routing in logits]).detach()
    router = model.model.routers[0]
    torch.testing.assert_close(router.normaliser, pooled_TE.exp().mean(0).log())
    assert report.routers[0].twin == pytest.approx(1.5, abs=1e-9)
    assert len(pooled_TE) == report.tokens
    other = tiny(num_hidden_layers=1, score=score)
    calibrate(other, text, passes=0)
    torch.testing.assert_close(other.model.routers[0].normaliser, router.normaliser)
    assert budgets_under_twin(other, text)[0] == pytest.approx(1.5, abs=0.1)  # normalised by batches


def test_a_normaliser_without_a_cutoff_is_calibrated_too():
    model = tiny(score="token_softmax", select={"name": "top_k", "k": 2})
    report = calibrate(model, batches())
    assert [router.twin for router in report.routers] == [2.0] * 3
    assert not any(router.normaliser.isnan().any() for router in model.model.routers)
    with pytest.raises(IndexError):
        calibrate(tiny(score="token_softmax"), [{name: x + 1000 for name, x in batches(1)[0].items()}])
