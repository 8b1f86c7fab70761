"""Padding and company, in whatever way a model is called.

Legend: B batch, S sequence, D model width.
"""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from crossways import reroute
from crossways.errors import UserError

FAMILIES = ["olmoe", "deepseek_v3", "gpt_oss", "gemma4_whole", "qwen3_next", "granitemoehybrid", "llama4"]


@pytest.fixture(params=FAMILIES)
def model(request, make):
    return make(request.param)


@pytest.fixture
def calibrated(make):
    """OLMoE by USMoE, with cutoffs for its twin."""
    model = make("olmoe")
    handle = reroute(model, "usmoe", k=1.5)
    handle.set_estimates([{"cutoff": [0.19]}, {"cutoff": [0.21]}])
    return model


def positions(mask_BS):
    return (mask_BS.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("rule", ["usmoe", "expert-choice", "top-c"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_one_decision_however_the_model_is_called(make, batch, rule, side):
    model, inputs = make("olmoe"), batch(side)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real = mask.bool()
    with reroute(model, rule) as handle, torch.no_grad():
        expected = model(**inputs).logits[real]
        pairs = [site.routing.assignment.to_mask() for site in handle.blocks]
        embeds = model.get_input_embeddings()(ids)
        causal = torch.ones(9, 9, dtype=torch.bool).tril()[None, None] & mask.bool()[:, None, None, :]
        floats = torch.zeros(2, 1, 9, 9).masked_fill(~causal, torch.finfo(torch.float32).min)
        calls = {
            "embeddings": lambda: model(inputs_embeds=embeds, attention_mask=mask).logits,
            "positions": lambda: model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits,
            "no cache": lambda: model(**inputs, use_cache=False).logits,
            "positional": lambda: model(ids, mask).logits,
            "inner model": lambda: model.lm_head(model.model(**inputs).last_hidden_state),
            "boolean mask": lambda: model(input_ids=ids, attention_mask=mask.bool()).logits,
            "four dimensions": lambda: model(input_ids=ids, attention_mask=causal).logits,
            "four dimensions, added": lambda: model(input_ids=ids, attention_mask=floats).logits,
            "static cache": lambda: (
                model(**inputs, past_key_values=StaticCache(config=model.config, max_cache_len=16)).logits
            ),
            "dynamic cache": lambda: model(**inputs, past_key_values=DynamicCache(config=model.config)).logits,
        }
        for how, call in calls.items():
            torch.testing.assert_close(call()[real], expected, rtol=1e-3, atol=1e-4, msg=how)
            for site, mask_TE in zip(handle.blocks, pairs, strict=True):
                assert torch.equal(site.routing.assignment.to_mask(), mask_TE), how


def test_a_wrapper_that_makes_masks_of_its_own(make, batch):
    """Its language model is handed one four-dimensional mask for each kind of attention."""
    model = make("gemma4_whole")
    with reroute(model, "usmoe") as handle, torch.no_grad():
        for side in ("left", "right"):
            inputs = batch(side)
            model(**inputs, use_cache=False)
            for site in handle.blocks:
                experts_BS = site.routing.assignment.experts_per_token_T().view(2, 9)
                assert experts_BS.sum(1).tolist() == [18, 12]
                assert not experts_BS[inputs["attention_mask"] == 0].any()


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_does_not_depend_on_company(model, batch, cache):
    if cache == "static" and not type(model).__name__.startswith(("Olmoe", "GptOss", "Deepseek")):
        pytest.skip("has no static cache, or makes one in its own way")
    inputs = batch("left")
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_logits": True}
    if cache:
        settings |= {"cache_implementation": cache, "disable_compile": True}
    with reroute(model, "usmoe", k=1.5) as handle:
        handle.set_estimates([{"cutoff": [0.2]}] * len(handle.blocks))
        together = model.generate(**inputs, **settings)
        for row in range(2):
            real = inputs["attention_mask"][row].bool()
            alone = model.generate(**{name: t[row : row + 1, real] for name, t in inputs.items()}, **settings)
            torch.testing.assert_close(
                torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0], rtol=1e-3, atol=1e-3
            )
            assert torch.equal(together.sequences[row, 9:], alone.sequences[0, -5:])


SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 4},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", SETTINGS)
def test_every_way_to_generate_routes_by_the_twin(calibrated, batch, how):
    """Each token's logits, again from a full pass under the twin over what was generated."""
    inputs = batch(None, rows=1)
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None} | SETTINGS[how]
    from crossways.surgery.handle import handle_of

    handle = handle_of(calibrated)
    causal = []
    hook = handle.blocks[0].router.register_forward_hook(lambda _, args, routing: causal.append(args[1].causal))
    out = calibrated.generate(**inputs, **settings, return_dict_in_generate=True, output_logits=True)
    hook.remove()
    assert causal
    assert all(causal)
    with handle.causal(), torch.no_grad():
        full = calibrated(out.sequences, use_cache=False).logits[0, 8:-1]
    if how != "beams":
        torch.testing.assert_close(torch.stack(out.logits)[:, 0], full, rtol=1e-3, atol=1e-3)
        assert torch.equal(full.argmax(-1), out.sequences[0, 9:])
    assert handle._causal is None, "a call after generate goes by the rule again"
    with torch.no_grad():
        calibrated(**inputs, use_cache=False)
    assert int(handle.loads()[0].sum()) == 14


def test_sampling_is_that_of_the_same_logits(calibrated, batch):
    settings = {"max_new_tokens": 5, "do_sample": True, "pad_token_id": 0, "eos_token_id": None}
    sampled = []
    for _ in range(2):
        torch.manual_seed(3)
        sampled.append(calibrated.generate(**batch("left"), **settings))
    assert torch.equal(*sampled)


def test_an_assistant_changes_nothing(calibrated, make, batch):
    inputs = batch(None, rows=1)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain = calibrated.generate(**inputs, **settings)
    assistant = make("mixtral")
    assert torch.equal(calibrated.generate(**inputs, **settings, assistant_model=assistant), plain)


def test_a_filled_cache_means_decoding(calibrated, batch):
    from crossways.surgery.handle import handle_of

    handle, inputs = handle_of(calibrated), batch("left")
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad(), handle.causal():
        full = calibrated(ids, mask, position_ids=positions(mask)).logits
        cache = calibrated(ids[:, :5], mask[:, :5], position_ids=positions(mask)[:, :5]).past_key_values
    with torch.no_grad():  # no context: the cache says it
        step = calibrated(ids[:, 5:], mask, past_key_values=cache, position_ids=positions(mask)[:, 5:]).logits
    torch.testing.assert_close(step, full[:, 5:], rtol=1e-3, atol=1e-4)


def test_without_cutoffs_generation_says_what_to_do(make, batch):
    model = make("olmoe")
    with reroute(model, "usmoe"), pytest.raises(UserError, match="calibrate"):
        model.generate(**batch(), max_new_tokens=2)


def test_sequences_that_cannot_be_told_apart_are_refused(make, batch):
    """ERNIE-VL hands each modality's tokens to experts of its own, without saying which sequence they are of."""
    model = make("ernie4_5_vl_moe")
    inputs = batch()
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, 2:5] = 1
    with torch.no_grad():
        plain = model(**inputs, moe_mm_token_type_ids=kinds, use_cache=False).logits
        with reroute(model, "own"):
            assert torch.equal(model(**inputs, moe_mm_token_type_ids=kinds, use_cache=False).logits, plain)
        with reroute(model, "usmoe"), pytest.raises(UserError, match="cannot be told apart"):
            model(**inputs, moe_mm_token_type_ids=kinds, use_cache=False)
        with reroute(model, select="top_k", score="sigmoid"):
            assert not torch.equal(model(**inputs, moe_mm_token_type_ids=kinds, use_cache=False).logits, plain)
