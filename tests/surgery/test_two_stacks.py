"""A model that runs its layers as an encoder of text and as a decoder of a canvas: passes of two kinds.

Legend: B batch, S sequence, C canvas.
"""

from __future__ import annotations

import copy

import pytest
import torch

from crossways import reroute
from crossways.replay import recorded, replayed
from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import from_pretrained
from crossways.surgery.rule import presets

PRESETS = [name for name in presets() if name != "own"]
CANVAS = 5


@pytest.fixture
def model(make):
    return make("diffusion_gemma_whole")


@pytest.fixture
def inputs(batch):
    """A prompt of two rows, the second padded on the left, and a canvas for each."""
    given = batch("left")
    canvas_BC = torch.randint(3, 64, (2, CANVAS), generator=torch.Generator().manual_seed(4))
    mask_BS = torch.cat([given["attention_mask"], torch.ones_like(canvas_BC)], 1)
    positions = {"position_ids": (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
    length_B = given["attention_mask"].sum(1, keepdim=True)
    return (
        given
        | positions
        | {
            "decoder_input_ids": canvas_BC,
            "decoder_attention_mask": mask_BS,
            "decoder_position_ids": length_B + torch.arange(CANVAS),
        }
    )


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def test_both_stacks_are_found_with_their_blocks(model):
    with reroute(model, "usmoe") as handle:
        names = [type(stack.module).__name__ for stack in handle.stacks]
        assert names == ["DiffusionGemmaEncoderTextModel", "DiffusionGemmaDecoderModel"]
        assert [len(stack.blocks) for stack in handle.stacks] == [2, 2]
        assert [stack.both_ways for stack in handle.stacks] == [False, True]
        assert handle.decoder is handle.stacks[1].module
        assert not handle.left


def test_own_rule_is_the_identity_and_undo_leaves_nothing(model, inputs):
    before = logits_of(model, inputs)
    with reroute(model, "own") as handle:
        assert torch.equal(logits_of(model, inputs), before)
        assert [int(load_E.sum()) for load_E in handle.loads()] == [2 * 15, 2 * 15, 2 * 10, 2 * 10]
        for site in handle.blocks:
            site.own = False
        torch.testing.assert_close(logits_of(model, inputs), before, rtol=1e-3, atol=1e-4)
    with reroute(model, "usmoe"):
        assert not torch.equal(logits_of(model, inputs), before)
    assert torch.equal(logits_of(model, inputs), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_spend_each_stacks_budget_on_its_own_rows(model, inputs, preset):
    with reroute(model.train(), preset) as handle:
        out = model(**inputs).logits
        assert out.isfinite().all()
        for site in handle.blocks[:2]:
            count_BS = site.routing.assignment.experts_per_token_T().view(2, 9)
            assert not count_BS[inputs["attention_mask"] == 0].any(), "padding chose somebody"
            if preset in ("usmoe", "top-c", "token-choice"):
                assert count_BS.sum(1).tolist() == [18, 12]
        for site in handle.blocks[2:]:
            count_BC = site.routing.assignment.experts_per_token_T().view(2, CANVAS)
            if preset in ("usmoe", "top-c", "token-choice"):
                assert count_BC.sum(1).tolist() == [10, 10]
        out.square().mean().backward()
        assert all(site.block.router.proj.weight.grad.abs().sum() > 0 for site in handle.blocks)
        known = handle.estimates()
        assert [bool(each) for each in known] == [site.router.has_cutoff for site in handle.blocks]


def test_a_row_is_routed_alike_alone_and_in_company(model, inputs):
    with reroute(model, "usmoe", k=1.5):
        together = logits_of(model, inputs)
        for row in range(2):
            real_S = inputs["attention_mask"][row].bool()
            keep = {"input_ids": real_S, "attention_mask": real_S, "position_ids": real_S}
            keep["decoder_attention_mask"] = torch.cat([real_S, torch.ones(CANVAS).bool()])
            every = torch.ones(CANVAS).bool()
            alone = {name: t[row : row + 1, keep.get(name, every)] for name, t in inputs.items()}
            torch.testing.assert_close(logits_of(model, alone)[0], together[row], rtol=1e-3, atol=1e-4)


def test_generation_takes_the_twin_for_text_and_the_rule_for_the_canvas(model, inputs):
    """Attention on the canvas looks both ways, so a rule that looks at the canvas looks no further."""
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with reroute(model, "usmoe", k=1.5) as handle:
        handle.set_estimates([{"cutoff": [0.2]}] * 4)
        causal = {site.block.name: set() for site in handle.blocks}
        hooks = [
            site.router.register_forward_hook(
                lambda _, args, said, name=site.block.name: causal[name].add(args[1].causal)
            )
            for site in handle.blocks
        ]
        torch.manual_seed(0)
        model.generate(**prompt, max_new_tokens=CANVAS, max_denoising_steps=2)
        for hook in hooks:
            hook.remove()
        assert list(causal.values()) == [{True}, {True}, {False}, {False}]


def test_decisions_of_several_stacks_are_not_replayed(model, inputs):
    """Their passes need not come in the order of the recorded ones."""
    with recorded(model) as decisions:
        logits_of(model, inputs)
    with pytest.raises(ValueError, match=r"2 stacks.* replay one stack"), replayed(model, decisions):
        logits_of(model, inputs)


@torch.no_grad()
def test_decisions_of_one_stack_are(model, batch):
    encoder, given = model.model.encoder, batch("left")
    with recorded(encoder) as decisions:
        before = encoder(**given)[0]
    with replayed(encoder, decisions):
        torch.testing.assert_close(encoder(**given)[0], before)


def test_a_rule_over_the_batch_has_its_twin_on_the_canvas_too(model, inputs):
    with reroute(model, "usmoe-batch", k=1.5) as handle:
        handle.set_estimates([{"cutoff": [0.2]}] * 4)
        with handle.causal():
            together = logits_of(model, inputs)
        assert [site.passing.causal for site in handle.blocks] == [True] * 4
    assert together.isfinite().all()


def test_it_travels_with_the_checkpoint_and_with_copies(model, inputs, tmp_path):
    before = logits_of(model, inputs)
    handle = reroute(model, "usmoe", k=1.5)
    handle.set_estimates([{"cutoff": [0.1 * i]} for i in range(1, 5)])
    routed = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, auto_class=type(model))
    assert torch.equal(logits_of(again, inputs), routed)
    assert handle_of(again).estimates() == handle.estimates()
    twin = copy.deepcopy(model)
    assert handle_of(twin).stacks[0].module is not handle.stacks[0].module
    handle.undo()
    assert torch.equal(logits_of(model, inputs), before)
    assert torch.equal(logits_of(twin, inputs), routed)
