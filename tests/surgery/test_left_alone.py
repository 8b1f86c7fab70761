"""What rerouting leaves alone, refuses, or takes in part."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from crossways import reroute
from crossways.surgery.find import UnknownRoutingError


def printed(handle):
    console = Console(width=300)
    with console.capture() as capture:
        console.print(handle.table())
    return capture.get()


def test_layers_that_choose_by_token_are_listed_and_stay(make, batch):
    model, inputs = make("deepseek_v4"), batch("left")
    hashed = model.model.layers[0].mlp
    chosen = []
    hook = hashed.gate.register_forward_hook(lambda _, args, output: chosen.append(output[2]))
    with torch.no_grad():
        model(**inputs, use_cache=False)
        with reroute(model, "usmoe") as handle:
            model(**inputs, use_cache=False)
            text = printed(handle)
    hook.remove()
    assert torch.equal(*chosen)
    assert [site.block.name for site in handle.blocks] == ["model.layers.1.mlp"]
    assert [left.block for left in handle.left] == ["model.layers.0.mlp"]
    assert "chooses by token ids, not by scores" in text


def test_a_model_of_hashed_layers_alone_is_refused(make):
    model = make("deepseek_v4", mlp_layer_types=["hash_moe", "hash_moe"])
    with pytest.raises(UnknownRoutingError, match="chooses by token ids"):
        reroute(model, "usmoe")


def test_routed_encoders_of_images_stay(make):
    with reroute(make("dots3_note_whole"), "usmoe") as handle:
        assert all("language_model" in site.block.name for site in handle.blocks)
        assert len(handle.left) == 1
        assert "vision" in handle.left[0].block
        assert "not of the language model" in printed(handle)


def test_an_inner_model_may_be_rerouted_by_itself(make, batch):
    model, inputs = make("olmoe"), batch("left")
    with reroute(model, "usmoe") as handle, torch.no_grad():
        expected = model(**inputs).logits
    with reroute(model.model, "usmoe") as handle, torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
        assert handle.leaky
        handle.always_causal = True
        assert not handle.leaky
        with pytest.raises(ValueError, match="calibrate"):
            model(**inputs)


def test_weights_spread_over_devices_are_refused(make):
    model = make("olmoe")
    model.model.layers[1].mlp.gate.weight.device_mesh = "as distributed tensors have"
    with pytest.raises(UnknownRoutingError, match="spread over devices"):
        reroute(model, "usmoe")


def test_a_router_that_is_not_explained_is_refused(make):
    model = make("olmoe")
    gate = model.model.layers[1].mlp.gate
    plain = type(gate).forward
    gate.forward = lambda x: (lambda out: (out[0], out[1] ** 2, out[2]))(plain(gate, x))
    with pytest.raises(UnknownRoutingError, match=r"layers\.1\.mlp\.gate.*none of the \d+ known ways"):
        reroute(model, "usmoe")
    assert not any(module._forward_hooks for module in model.modules())


def test_twice_is_refused_and_undoing_twice_is_not(make):
    model = make("olmoe")
    handle = reroute(model, "usmoe")
    with pytest.raises(ValueError, match="rerouted already"):
        reroute(model, "top-c")
    handle.undo()
    handle.undo()
    assert "undone" in repr(handle)
    reroute(model, "top-c").undo()
