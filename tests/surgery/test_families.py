"""Every family of transformers with a router and stacked experts, by a tiny random model of each.

Legend: B batch, S sequence, E experts, P executed pairs.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import asdict

import pytest
import torch

from crossways import reroute
from crossways.surgery.find import UnknownRoutingError
from crossways.surgery.handle import CONFIG_KEY, handle_of
from crossways.surgery.rule import presets

PRESETS = [name for name in presets() if name != "own"]


@pytest.fixture(scope="module")
def model(family, make):
    return make(family)


@pytest.fixture
def batches(batch):
    """Without padding, with it on the right, on the left, and one sequence."""
    return [batch(padding) for padding in (None, "right", "left")] + [batch(None, rows=1)]


def logits_of(model, inputs):
    with torch.no_grad():
        return model(**inputs, use_cache=False)[0]


def state_of(model):
    """Everything that reroute might leave behind, on every module and in the configuration."""

    def content(value):
        return len(value) if isinstance(value, OrderedDict) else id(value)

    modules = {
        name: {key: content(value) for key, value in vars(module).items()} for name, module in model.named_modules()
    }
    return modules, model.config.to_dict(), list(model.state_dict())


def explicit(reading):
    """The family's own rule in words."""
    rule = {"select": {"name": reading.select.name, **asdict(reading.select)}}
    if not reading.weighs:
        rule |= {"score": reading.score.name}
        rule |= {"renormalize": reading.renormalize, "weight_scale": reading.weight_scale}
    return rule


def test_own_rule_is_the_identity_and_undo_leaves_nothing(family, model, batches):
    before = [logits_of(model, inputs) for inputs in batches]
    clean = state_of(model)
    with reroute(model, "own") as handle:
        reading = handle.blocks[0].reading
        assert all(change.after == "unchanged" for change in handle.changes)
        for inputs, logits in zip(batches, before, strict=True):
            assert torch.equal(logits_of(model, inputs), logits)
            pairs = handle.loads()
            assert pairs
            tokens = int(inputs["attention_mask"].sum())
            assert all(int(load_E.sum()) == reading.k * tokens for load_E in pairs), "padding was recorded"
    assert state_of(model) == clean
    with reroute(model, **explicit(reading)) as handle:
        assert all(change.after == "unchanged" for change in handle.changes)
        for inputs, logits in zip(batches, before, strict=True):
            assert torch.equal(logits_of(model, inputs), logits)
    with reroute(model, "usmoe"):
        changed = logits_of(model, batches[2])
    assert not torch.equal(changed, before[2])
    assert state_of(model) == clean
    for inputs, logits in zip(batches, before, strict=True):
        assert torch.equal(logits_of(model, inputs), logits)


def test_own_rule_is_the_identity_in_training_and_generation(family, model, batch):
    def trained():
        model.train()
        model.zero_grad()
        torch.manual_seed(7)
        out = model(**batch("left"), use_cache=False)[0]
        out.float().square().mean().backward()
        model.eval()
        return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    def generated():
        if not model.can_generate():
            return None
        return model.generate(**batch("left"), max_new_tokens=4, do_sample=False, pad_token_id=0)

    out, gradients = trained()
    tokens = generated()
    with reroute(model, "own"):
        again, same = trained()
        assert torch.equal(again, out)
        assert gradients.keys() == same.keys()
        assert all(torch.equal(gradients[name], same[name]) for name in gradients)
        if tokens is not None:
            assert torch.equal(generated(), tokens)
    model.zero_grad()


def test_the_own_rule_decided_anew_comes_to_the_same(family, model, batch):
    """What is known of a family is enough to do by ourselves what its router does."""
    inputs = batch("left")
    real = inputs["attention_mask"].bool()
    before = logits_of(model, inputs)
    with reroute(model, "own") as handle:
        for site in handle.blocks:
            site.own = False
        again = logits_of(model, inputs)
    torch.testing.assert_close(again[real], before[real], rtol=1e-3, atol=1e-4)


def executed(block, into):
    """Hook that counts what a block's experts are given to compute, expert by expert; E is an empty place."""

    def hook(module, args, kwargs, output):
        index = [*args, *kwargs.values()][1]
        into.append(torch.bincount(index[index < block.num_experts], minlength=block.num_experts))

    return block.experts.register_forward_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_execute_their_pairs_and_train_the_gate(family, model, batch, preset):
    inputs = batch("left")
    model.train()
    with reroute(model, preset) as handle:
        counts = [[] for _ in handle.blocks]
        stacked = [(site, into) for site, into in zip(handle.blocks, counts, strict=True) if hands_over_pairs(site)]
        hooks = [executed(site.block, into) for site, into in stacked]
        try:
            out = model(**inputs, use_cache=False)[0]
        finally:
            for hook in hooks:
                hook.remove()
        called = [site for site in handle.blocks if site.routing is not None]
        assert called
        assert torch.isfinite(out[inputs["attention_mask"].bool()]).all()
        for site, into in stacked:
            if site.routing is None or site.own:  # where the rule is the family's own, it computes padding too
                continue
            computing = site.block.num_computing  # the others may fill places that nobody wants
            chosen_E = site.routing.assignment.load_E()[:computing]
            assert torch.equal(into[0][:computing], chosen_E), "other pairs were computed than chosen"
        check_budget(preset, called[0], inputs["attention_mask"])
        model.zero_grad()
        out[inputs["attention_mask"].bool()].float().square().mean().backward()
        for site in called:
            gate = max((p for p in site.block.router.parameters() if p.dim() == 2), key=lambda p: p.numel())
            assert gate.grad is not None
            assert gate.grad.isfinite().all()
            single = site.router.renormalize and int(site.routing.assignment.experts_per_token_T().max()) == 1
            assert single or gate.grad.abs().sum() > 0, "no gradient reaches the gate"
        for site in called:
            cutoff = site.router.snapshot("cutoff")
            assert cutoff is None or cutoff.isfinite().all(), "training did not estimate the twin's cutoff"
    model.zero_grad()
    model.eval()


def hands_over_pairs(site):
    return site.reading.hands_over in ("pairs", "late")


def check_budget(preset, site, mask_BS):
    pairs, k = site.routing.assignment, site.reading.k
    valid_T = mask_BS.bool().flatten()
    assert not pairs.experts_per_token_T()[~valid_T].any(), "padding chose somebody"
    per_row_B = pairs.experts_per_token_T().view(mask_BS.shape).sum(1)
    if preset in ("usmoe", "top-c", "token-choice"):
        assert per_row_B.tolist() == (k * mask_BS.sum(1)).tolist()
    if preset == "usmoe-batch":
        assert int(per_row_B.sum()) == k * int(mask_BS.sum())
    if preset == "expert-choice":
        assert pairs.load_E().unique().numel() <= 2  # each row gives each expert the same number


def test_a_sequence_is_routed_alike_alone_and_in_company(family, model, batch):
    with reroute(model, "usmoe", k=1.5):
        for side in ("right", "left"):
            inputs = batch(side)
            together = logits_of(model, inputs)
            for row in range(len(together)):
                real = inputs["attention_mask"][row].bool()
                alone = logits_of(model, {name: tensor[row : row + 1, real] for name, tensor in inputs.items()})
                torch.testing.assert_close(together[row, real], alone[0], rtol=1e-3, atol=1e-4)


def test_full_pass_under_the_twins_is_the_cached_one(family, catalogue, model, batch):
    if not model.can_generate():
        pytest.skip("makes no text")
    inputs = batch(None if "cached_padding" in catalogue[family] else "left")
    with reroute(model, "usmoe-threshold", k=1.5) as handle:
        model.train()
        model(**inputs, use_cache=False)  # one step estimates the cutoffs
        model.eval()
        for router in handle.routers.values():
            router.cutoff.mul_(0.99)  # away from the pair that it was taken from, which rounding might move
        said = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            eos_token_id=None,
        )
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 4), value=1)
        with handle.causal():
            full = logits_of(model, {"input_ids": said.sequences, "attention_mask": mask})
    stepwise = torch.stack(said.logits, 1)
    close = catalogue[family].get("cached_tolerance", 1e-3)
    torch.testing.assert_close(full[:, -5:-1], stepwise, rtol=close, atol=close)


def test_refused_with_the_reason_and_left_untouched(refused_family, catalogue, make):
    model = make(refused_family)
    clean = state_of(model)
    with pytest.raises(UnknownRoutingError) as error:
        reroute(model, "usmoe")
    assert catalogue[refused_family]["refused"] in str(error.value)
    assert "\n" not in str(error.value)
    assert state_of(model) == clean
    assert handle_of(model) is None
    assert not hasattr(model.config, CONFIG_KEY)
