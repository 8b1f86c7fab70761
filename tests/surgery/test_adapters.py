"""PEFT adapters on rerouted models, put on before and after."""

from __future__ import annotations

import pytest
import torch

from crossways import reroute
from crossways.surgery.handle import handle_of

peft = pytest.importorskip("peft")

EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
GATE = {"target_modules": ["q_proj"], "modules_to_save": ["mlp.gate"]}


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs, use_cache=False).logits


def adapted(model, settings):
    """With random adapters, which change the outputs from the start."""
    torch.manual_seed(1)
    with_lora = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings)).eval()
    torch.manual_seed(2)
    for name, parameter in sorted(with_lora.named_parameters()):
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return with_lora


@pytest.mark.parametrize("settings", [ATTENTION, EXPERTS, GATE], ids=["attention", "experts", "gate"])
def test_before_and_after_rerouting_come_to_the_same(make, batch, settings):
    inputs = batch("left")
    late = make("olmoe")
    handle = reroute(late, "usmoe", k=1.5)
    rerouted = logits_of(late, inputs)
    late = adapted(late, settings)
    early = adapted(make("olmoe"), settings)
    own = logits_of(early, inputs)
    reroute(early, "usmoe", k=1.5)
    assert handle_of(late) is handle
    assert torch.equal(logits_of(early, inputs), logits_of(late, inputs))
    assert not torch.allclose(logits_of(early, inputs), rerouted)
    assert not torch.allclose(logits_of(early, inputs), own)
    assert [int(load_E.sum()) for load_E in handle.loads()] == [14 + 9, 14 + 9]
    with_loss = late.train()(**inputs, labels=inputs["input_ids"])
    with_loss.loss.backward()
    trainable = [(name, p) for name, p in late.named_parameters() if p.requires_grad]
    assert trainable
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in trainable)
    late.eval()
    tokens = late.generate(**inputs, max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert tokens.shape == (2, 11)
    handle.undo()
    handle_of(early).undo()
    assert torch.equal(logits_of(early, inputs), own)
    assert torch.equal(logits_of(late, inputs), own)


@pytest.mark.parametrize("settings", [ATTENTION, EXPERTS], ids=["attention", "experts"])
def test_merged_adapters_stay_rerouted(make, batch, settings):
    inputs = batch("right")
    model = adapted(make("olmoe"), settings)
    handle = reroute(model, "usmoe")
    before = logits_of(model, inputs)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged, inputs), before, rtol=1e-3, atol=1e-4)
    handle.undo()
    assert not torch.allclose(logits_of(merged, inputs), before)
