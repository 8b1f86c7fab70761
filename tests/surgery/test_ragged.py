"""Chosen pairs straight to our expert compute: the same as the family's own computes, and only where it may."""

from __future__ import annotations

import copy

import pytest
import torch
from rich.console import Console

import crossways
from crossways import reroute
from crossways.errors import UserError
from crossways.experts import why_not
from crossways.surgery.handle import handle_of
from crossways.surgery.ragged import RaggedExperts
from crossways.surgery.rule import Rule

REASON = why_not("fused", torch.device("cpu"), torch.float32)
needs_fused = pytest.mark.skipif(REASON is not None, reason=str(REASON))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs, use_cache=False)[0]


def stands_in(model):
    return [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), RaggedExperts)]


def notes(handle):
    console = Console(width=400)
    with console.capture() as capture:
        console.print(handle.table())
    return capture.get()


def trained(model, inputs):
    model.train()
    model.zero_grad()
    torch.manual_seed(7)
    out = model(**inputs, use_cache=False)[0]
    real = out[inputs["attention_mask"].bool()].float()
    (real * torch.randn(real.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    model.eval()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@needs_fused
def test_every_family_computes_the_same_either_way(family, make, batch):
    """Outputs and gradients; of families whose layout is not ours both are the family's own."""
    model, inputs = make(family), batch("left")
    mask = inputs["attention_mask"].bool()
    found = []
    for experts in ("own", "crossways"):
        with reroute(model, "usmoe", k=1.5, experts=experts) as handle:
            assert experts == "crossways" or not stands_in(model)
            found.append((logits_of(model, inputs)[mask], *trained(model, inputs)))
            said = [change.note for change in handle.changes]
    assert all("experts" in note for note in said) or handle.blocks[0].reading.hands_over == "dense"
    assert not stands_in(model)
    (logits, out, gradients), (same_logits, same_out, same_gradients) = found
    torch.testing.assert_close(same_logits, logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(same_out[mask], out[mask], rtol=1e-3, atol=1e-4)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        scale = gradient.norm().clamp_min(1e-6)
        assert (same_gradients[name] - gradient).norm() / scale < 1e-3, name


@needs_fused
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rule", ["usmoe", "expert-choice", "top-p"])
def test_dtypes_and_rules(make, batch, dtype, rule):
    if reason := why_not("fused", torch.device("cpu"), dtype):
        pytest.skip(reason)
    model, inputs = make("qwen2_moe").to(dtype), batch("right")
    mask = inputs["attention_mask"].bool()
    with reroute(model, rule, experts="own"):
        expected = logits_of(model, inputs)[mask]
    with reroute(model, rule):
        assert len(stands_in(model)) == 2
        actual = logits_of(model, inputs)[mask]
    assert ((actual - expected).norm() / expected.norm()).item() < TOLERANCE[dtype]


@needs_fused
def test_who_computes_is_in_the_table_and_follows_what_the_model_is_told(make, batch):
    model, inputs = make("olmoe"), batch("left")
    with reroute(model, "usmoe", k=1.5) as handle:
        assert "experts by crossways (fused)" in notes(handle)
        ragged = vars(model.model.layers[0].mlp.experts)["forward"]
        assert not isinstance(ragged.plan(), str)
        model.set_experts_implementation("eager")
        assert "'eager'" in ragged.plan()
        model.set_experts_implementation("grouped_mm")
        model.half()
        assert "float16" in ragged.plan()
        model.float()
        assert not isinstance(ragged.plan(), str)
        assert logits_of(model, inputs).isfinite().all()
    model.set_experts_implementation("batched_mm")
    with reroute(model, "usmoe") as handle:
        assert "experts by transformers: the model computes its experts by 'batched_mm'" in notes(handle)
    with reroute(model, "usmoe", experts="crossways") as handle:
        assert "experts by crossways (fused)" in notes(handle)
    with reroute(make("gpt_oss"), "usmoe", experts="crossways") as handle:
        assert "experts by transformers: its experts have biases" in notes(handle)


def test_the_familys_own_rule_is_never_touched(make):
    model = make("olmoe")
    with reroute(model, "own", experts="crossways") as handle:
        assert not stands_in(model)
        assert "experts by" not in notes(handle)


@needs_fused
def test_the_switch_travels_with_the_checkpoint(make, tmp_path):
    model = make("olmoe")
    reroute(model, "top-c", k=1.5, experts="own")
    model.save_pretrained(tmp_path)
    again = crossways.from_pretrained(tmp_path)
    assert handle_of(again).rule.experts == "own"
    assert not stands_in(again)
    assert "experts" not in Rule(select={"name": "top_k"}).to_json()
    with pytest.raises(UserError, match="experts must be one of own, crossways"):
        reroute(make("olmoe"), "usmoe", experts="theirs")


@needs_fused
def test_accelerates_hooks_stay_in_either_order(make, batch):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, inputs = make("olmoe"), batch("left")
    plain = logits_of(model, inputs)
    with reroute(model, "usmoe"):
        routed = logits_of(model, inputs)
    experts = model.model.layers[0].mlp.experts
    hook = Counting()
    add_hook_to_module(experts, hook)  # before
    with reroute(model, "usmoe"):
        assert torch.equal(logits_of(model, inputs), routed)
    assert hook.calls == 1
    assert torch.equal(logits_of(model, inputs), plain)
    remove_hook_from_module(experts)
    with reroute(model, "usmoe"):  # after
        add_hook_to_module(experts, hook)
        assert torch.equal(logits_of(model, inputs), routed)
    assert torch.equal(logits_of(model, inputs), plain)
    assert hook.calls == 4
    remove_hook_from_module(experts)
    assert torch.equal(logits_of(model, inputs), plain)


@needs_fused
def test_a_forward_of_somebody_elses_is_left_in_place(make, batch):
    model, inputs = make("olmoe"), batch("left")
    experts = model.model.layers[0].mlp.experts
    experts.forward = lambda *args: 0.5 * type(experts).forward(experts, *args)
    patched = experts.forward
    halved = logits_of(model, inputs)
    with reroute(model, "usmoe") as handle:
        assert "replaced by somebody else" in notes(handle)
        assert len(stands_in(model)) == 1
        logits_of(model, inputs)
    assert experts.forward is patched
    assert torch.equal(logits_of(model, inputs), halved)


@needs_fused
def test_a_copy_of_the_experts_computes_with_its_own_weights(make):
    model = make("olmoe")
    handle = reroute(model, "usmoe")
    experts = model.model.layers[0].mlp.experts
    twin = copy.deepcopy(experts)
    with torch.no_grad():
        twin.down_proj.mul_(2.0)
        inputs = torch.randn(3, 32), torch.tensor([[0, 8], [1, 2], [8, 8]]), torch.rand(3, 2)
        torch.testing.assert_close(twin(*inputs), 2 * experts(*inputs))
        handle.undo()
        index = torch.tensor([[0, 3], [1, 2], [4, 5]])
        torch.testing.assert_close(twin(inputs[0], index, inputs[2]), 2 * experts(inputs[0], index, inputs[2]))


@needs_fused
def test_under_autocast(make, batch):
    if reason := why_not("fused", torch.device("cpu"), torch.bfloat16):
        pytest.skip(reason)
    model, inputs = make("olmoe"), batch(None)
    with reroute(model, "usmoe", experts="own"), torch.autocast("cpu", torch.bfloat16):
        expected = logits_of(model, inputs).float()
    with reroute(model, "usmoe"), torch.autocast("cpu", torch.bfloat16):
        actual = logits_of(model, inputs).float()
    assert ((actual - expected).norm() / expected.norm()).item() < 5e-2
