"""Replayed decisions on models of transformers, rerouted and as they are."""

from __future__ import annotations

import pytest
import torch

from crossways import reroute
from crossways.errors import UserError
from crossways.processes import balance_over
from crossways.replay import recorded, replayed
from crossways.surgery.handle import handle_of

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss", "llama4_text"]


@pytest.fixture(params=FAMILIES)
def model(request, make):
    return make(request.param)


def stirred(model):
    """Other routers, so that by itself the model would decide otherwise."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name or name.endswith("gate.weight"):
                parameter.copy_(torch.randn_like(parameter))


def pairs(decisions):
    return [
        sorted(zip(decided.token_P.tolist(), decided.expert_P.tolist(), strict=True))
        for one in decisions.passes
        for decided in one.decided_R
    ]


@pytest.mark.parametrize("rerouted", [False, True])
def test_recorded_experts_run_again_with_the_new_weights(model, batch, rerouted):
    inputs = batch("left")
    handle = reroute(model, "own") if rerouted else None
    with recorded(model) as decisions:
        before = model(**inputs, use_cache=False)[0]
    valid_BS = inputs["attention_mask"].bool()  # padding, which the family itself routes, is not recorded
    with replayed(model, decisions):
        after = model(**inputs, use_cache=False)[0]
    torch.testing.assert_close(after[valid_BS], before[valid_BS], rtol=1e-4, atol=1e-5)
    stirred(model)
    model.train()
    with recorded(model) as otherwise, torch.no_grad():
        model(**inputs, use_cache=False)
    assert pairs(otherwise) != pairs(decisions)
    with replayed(model, decisions), recorded(model) as again:
        out = model(**inputs, use_cache=False)[0]
    assert pairs(again) == pairs(decisions)
    assert handle_of(model) is handle
    out.float().square().mean().backward()
    routers = [p for name, p in model.named_parameters() if "router" in name or name.endswith("gate.weight")]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in routers)


def test_gradient_checkpointing_repeats_each_pass(make, batch):
    inputs, others = batch("left"), batch("right")
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = make("olmoe").train()
        with recorded(model) as decisions:
            model(**inputs, use_cache=False)
            model(**others, use_cache=False)
        torch.manual_seed(1)
        stirred(model)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            with pytest.raises(UserError, match=r"reroute\(model, 'own'\) first"), replayed(model, decisions):
                pass
        reroute(model, "own")
        with replayed(model, decisions):
            passes = [model(**given, use_cache=False)[0] for given in (inputs, others)]
        sum(out.square().mean() for out in passes).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for again, first in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(again, first, rtol=1e-4, atol=1e-6)


def test_a_family_whose_weights_hang_on_its_own_choice_is_refused(make, batch):
    model = make("phimoe")
    with recorded(model) as decisions:
        model(**batch("left"), use_cache=False)
    with pytest.raises(UserError, match=r"cannot be replayed.* score='softmax'"), replayed(model, decisions):
        pass
    assert handle_of(model) is None
    with reroute(model, "token-choice", score="softmax"), torch.no_grad():  # what the refusal says to do
        with recorded(model) as decisions:
            before = model(**batch("left"), use_cache=False)[0]
        with replayed(model, decisions):
            torch.testing.assert_close(model(**batch("left"), use_cache=False)[0], before)


def test_routers_of_a_rerouted_model_are_told_whose_loads_count(make):
    model = make("olmoe")
    handle = reroute(model, select={"name": "top_c", "k": 2})
    balance_over(model, alone=True)
    assert all(router.processes.alone for router in handle.routers.values())
