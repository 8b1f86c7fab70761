"""What a rerouted model must survive: saving, copies, dtypes, checkpointing, adapters, training, compilation."""

from __future__ import annotations

import copy
import io
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import crossways
from crossways import reroute
from crossways.surgery.handle import CONFIG_KEY, handle_of
from crossways.surgery.reroute import from_pretrained

CUTOFF = 0.2


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs, use_cache=False)[0]


def with_cutoffs(model, rule="usmoe", **changes):
    handle = reroute(model, rule, **changes)
    handle.set_estimates([{"cutoff": [CUTOFF + 0.01 * i]} for i in range(len(handle.blocks))])
    return handle


@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "llama4_text", "gpt_oss"])
def test_rule_and_cutoffs_travel_with_the_checkpoint(make, batch, tmp_path, name):
    model, inputs = make(name), batch("left")
    plain = logits_of(model, inputs)
    handle = with_cutoffs(model, k=1.5)
    routed = logits_of(model, inputs)
    with handle.causal():
        twin = logits_of(model, inputs)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert not any("crossways" in key or "cutoff" in key for key in model.state_dict())
    again = from_pretrained(tmp_path)
    assert torch.equal(logits_of(again, inputs), routed)
    with handle_of(again).causal():
        assert torch.equal(logits_of(again, inputs), twin)
    as_saved = json.loads((tmp_path / "config.json").read_text())[CONFIG_KEY]
    assert as_saved["rule"]["select"] == {"name": "top_c", "k": 1.5}
    unaware = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(unaware, inputs), plain)
    reroute(unaware)  # takes up the rule in the configuration
    assert torch.equal(logits_of(unaware, inputs), routed)
    handle_of(again).undo()
    again.save_pretrained(tmp_path / "undone")
    assert CONFIG_KEY not in json.loads((tmp_path / "undone" / "config.json").read_text())


@pytest.mark.slow
def test_a_fresh_process_computes_the_same(make, batch, tmp_path):
    model, inputs = make("olmoe"), batch("left")
    handle = with_cutoffs(model)
    model.save_pretrained(tmp_path)
    with handle.causal():
        expected = logits_of(model, inputs)
    torch.save(inputs, tmp_path / "inputs.pt")
    program = (
        "import sys, torch, crossways\n"
        "torch.set_num_threads(1)\n"
        "from crossways.surgery.handle import handle_of\n"
        "model = crossways.from_pretrained(sys.argv[1]).eval()\n"
        "inputs = torch.load(sys.argv[1] + '/inputs.pt')\n"
        "with torch.no_grad(), handle_of(model).causal():\n"
        "    torch.save(model(**inputs, use_cache=False).logits, sys.argv[1] + '/logits.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-5, atol=1e-6)


def test_dtype_changes_keep_cutoffs_in_float32(make, batch):
    model, inputs = make("olmoe"), batch("right")
    handle = with_cutoffs(model, "usmoe-threshold")
    model.to(torch.bfloat16)
    assert logits_of(model, inputs).dtype == torch.bfloat16
    assert {router.cutoff.dtype for router in handle.routers.values()} == {torch.float32}
    model.float()
    handle.undo()
    assert logits_of(model, inputs).dtype == torch.float32


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_copies_are_rerouted_by_themselves(make, batch, copied):
    model, inputs = make("olmoe"), batch("left")
    plain = logits_of(model, inputs)
    handle = with_cutoffs(model)
    model.train()
    model(**inputs).logits.sum().backward()  # leaves a graph, which cannot be copied, wherever it is kept
    model.eval()
    routed = logits_of(model, inputs)
    if copied == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    other = handle_of(twin)
    assert all(site.routing is None for site in other.blocks), "what belongs to a pass is not copied"
    assert torch.equal(logits_of(twin, inputs), routed)
    assert other is not handle
    assert other.model is twin
    assert twin.generate.handle is other
    other.undo()
    assert torch.equal(logits_of(twin, inputs), plain)
    assert torch.equal(logits_of(model, inputs), routed)
    handle.undo()
    assert torch.equal(logits_of(model, inputs), plain)


def test_a_copy_of_one_module_does_not_drag_the_model_along(make):
    model = make("olmoe")
    handle = with_cutoffs(model)
    gate = copy.deepcopy(model.model.layers[0].mlp.gate)
    (hook,) = gate._forward_hooks.values()
    assert hook.__self__ is handle.blocks[0]
    handle.undo()
    output = gate(torch.randn(3, 32))
    assert output[2].shape == (3, 2), "the copy goes on rerouting after undo"


def gradients_of(model, batches):
    """Of the sum of the losses of all batches, all forward passes before the backward one."""
    model.zero_grad()
    torch.manual_seed(0)
    loss = sum(model(**inputs, labels=inputs["input_ids"], use_cache=False).loss for inputs in batches)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rule", ["usmoe", "usmoe-threshold", "expert-choice"])
@pytest.mark.parametrize("name", ["olmoe", "deepseek_v3", "llama4_text", "inkling", "dbrx"])
def test_gradient_checkpointing_repeats_each_pass_as_it_was(make, batch, name, rule, reentrant):
    batches = [batch("left"), batch("right"), batch(None, rows=1)]
    found = []
    for checkpointed in (False, True):
        model = make(name).train()
        handle = with_cutoffs(model) if rule == "usmoe" else reroute(model, rule)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        gradients = gradients_of(model, batches)
        found.append((gradients, handle.estimates(), handle.loads()))
        functions = [getattr(m, "_gradient_checkpointing_func", None) for m in model.modules()]
        assert not any(type(function).__name__ == "Repeating" for function in functions)
    (gradients, estimates, loads), (same, same_estimates, same_loads) = found
    assert gradients.keys() == same.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(same[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    assert same_estimates == estimates
    assert all(torch.equal(a, b) for a, b in zip(loads, same_loads, strict=True))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "nemotron_h"])
def test_every_experts_implementation_computes_the_same(make, batch, name, implementation):
    model, inputs = make(name), batch("left")
    mask = inputs["attention_mask"].bool()
    model.set_experts_implementation("eager")
    for rule, changes in [("usmoe", {"k": 1.5}), ("expert-choice", {}), ("usmoe", {"k": 0.25}), ("top-p", {})]:
        with reroute(model, rule, **changes):
            model.set_experts_implementation("eager")
            expected = logits_of(model, inputs)
            model.set_experts_implementation(implementation)
            torch.testing.assert_close(logits_of(model, inputs)[mask], expected[mask], rtol=1e-3, atol=1e-4)


def test_nobody_is_chosen_and_nothing_breaks(make, batch):
    """A cutoff above all scores: every token passes by the experts, in every implementation."""
    model, inputs = make("olmoe"), batch("left")
    outputs = []
    with reroute(model, select={"name": "threshold", "value": 5.0}) as handle:
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(implementation)
            outputs.append(logits_of(model, inputs))
            assert sum(int(load_E.sum()) for load_E in handle.loads()) == 0
    assert outputs[0].isfinite().all()
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.slow
def test_compiled_models_compute_the_same(make, batch):
    model = make("olmoe")
    with_cutoffs(model)
    batches = [batch("left"), batch("right"), batch(None, rows=1)]
    expected = [logits_of(model, inputs) for inputs in batches]
    compiled = torch.compile(model, backend="eager", dynamic=True)
    for inputs, logits in zip(batches, expected, strict=True):
        torch.testing.assert_close(logits_of(compiled, inputs), logits, rtol=1e-4, atol=1e-5)
    handle_of(model).undo()
    plain = [logits_of(model, inputs) for inputs in batches]
    for inputs, logits in zip(batches, plain, strict=True):
        torch.testing.assert_close(logits_of(compiled, inputs), logits, rtol=1e-4, atol=1e-5)


def test_accelerates_hooks(make, batch):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, inputs = make("olmoe"), batch("left")
    plain = logits_of(model, inputs)
    with reroute(model, "usmoe"):
        routed = logits_of(model, inputs)
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    for module in model.model.layers.modules():
        if not list(module.children()):
            hook = AlignDevicesHook(execution_device="cpu", place_submodules=True, weights_map=None)
            add_hook_to_module(module, hook)
    with reroute(model, "usmoe"):
        assert torch.equal(logits_of(model, inputs), routed)
    assert torch.equal(logits_of(model, inputs), plain)


def test_dispatched_to_one_device(make, batch, tmp_path):
    model, inputs = make("olmoe"), batch("left")
    with_cutoffs(model)
    routed = logits_of(model, inputs)
    model.save_pretrained(tmp_path)
    again = crossways.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert torch.equal(logits_of(again, inputs), routed)


class Windows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        ids = torch.randint(3, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trained(model, folder, resume=None, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "learning_rate": 1e-2,
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    arguments = TrainingArguments(**settings | changes)
    trainer = Trainer(model=model, args=arguments, train_dataset=Windows(), eval_dataset=Windows())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_trains_saves_and_resumes(make, tmp_path):
    model = make("olmoe")
    handle = reroute(model, "usmoe-threshold", k=1.5)
    start = model.model.layers[0].mlp.gate.weight.detach().clone()
    trained(model, tmp_path / "whole")
    assert not torch.equal(model.model.layers[0].mlp.gate.weight, start)
    halfway = tmp_path / "whole" / "checkpoint-2"
    resumed = crossways.from_pretrained(halfway)
    at_half = handle_of(resumed).estimates()
    assert at_half != handle.estimates()
    trained(resumed, tmp_path / "resumed", resume=str(halfway))
    assert handle_of(resumed).estimates() == handle.estimates()
    for (name, a), b in zip(model.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["olmoe", "mixtral", "gpt_oss", "granitemoe"])
def test_trainer_resumes_a_model_that_was_rerouted_anew(make, tmp_path, name):
    """Not loaded from the checkpoint: `Trainer` itself loads the weights into it, and nothing but tensors. Of most
    families, by itself, it would lose the experts, which transformers writes under other names."""
    whole = make(name)
    handle = reroute(whole, "usmoe-threshold", k=1.5)
    trained(whole, tmp_path / "whole")
    resumed = make(name)
    other = reroute(resumed, "usmoe-threshold", k=1.5)
    trained(resumed, tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert other.estimates() == handle.estimates()
    assert len(other.estimates()[0]["cutoff"]) == 1
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=name)


def test_the_best_model_comes_with_its_cutoffs(make, tmp_path):
    model = make("olmoe")
    handle = reroute(model, "usmoe", k=1.5)
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = trained(model, tmp_path, **changes, metric_for_best_model="loss", greater_is_better=True)
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-2"), "the loss should fall"
    assert handle.estimates() == handle_of(from_pretrained(best)).estimates()


def test_only_trainers_checkpoints_hold_the_cutoffs_as_a_tensor(make, batch, tmp_path):
    model, inputs = make("olmoe"), batch("left")
    plain = logits_of(model, inputs)
    handle = with_cutoffs(model)
    for folder, held in (("saved", False), ("checkpoint-7", True), ("checkpoint-last", False)):
        model.save_pretrained(tmp_path / folder)
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            assert ("crossways_routing" in file.keys()) == held, folder  # noqa: SIM118 (no mapping)
    known = handle.estimates()
    handle.undo()
    model.save_pretrained(tmp_path / "checkpoint-8")
    weights = load_file(tmp_path / "checkpoint-7" / "model.safetensors")
    assert weights.keys() - model.state_dict().keys() == {"crossways_routing"}
    assert (
        load_file(tmp_path / "checkpoint-8" / "model.safetensors").keys()
        == load_file(tmp_path / "saved" / "model.safetensors").keys()
    )
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-7"), inputs), plain)
    other = make("olmoe")
    with reroute(other, "usmoe") as handle:
        missing = other.load_state_dict(weights)
        assert handle.estimates() == known
        assert not missing.missing_keys
    with pytest.raises(RuntimeError, match="crossways_routing"):
        other.load_state_dict(weights)  # undone: nobody takes it up


def test_cutoffs_of_another_rule_are_refused(make, tmp_path):
    model = make("olmoe")
    with_cutoffs(model)
    model.save_pretrained(tmp_path / "checkpoint-1")
    other = make("olmoe")
    reroute(other, "expert-choice")
    with pytest.raises(ValueError, match="no cutoff of 1 numbers"):
        other.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"))
