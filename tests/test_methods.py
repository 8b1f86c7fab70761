"""Every listed method builds, learns, generates, survives saving, and is what it declares, as a whole model."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import yaml

from crossways.errors import UserError
from crossways.methods import (
    Method,
    find_method,
    method_config,
    method_parts,
    method_properties,
    methods,
    recipe_lines,
)
from crossways.models import CrosswaysForCausalLM

NAMES = list(methods())


ROWS, LENGTH, CUT = 3, 12, 6


def built(name, seed=0):
    """A small model whose routing differs from token to token, with cutoffs from a training pass."""
    torch.manual_seed(seed)
    config = method_config(
        find_method(name),
        vocab_size=37,
        hidden_size=16,
        intermediate_size=16,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = CrosswaysForCausalLM(config)
    model.model.count_tokens(torch.arange(37))
    with torch.enable_grad():
        model.train()(torch.randint(1, 37, (8, 24)))
    return model.eval()


def ids_of(seed):
    """Random tokens, each row with a first token of its own: equal prefixes would tie exactly, and ties may break
    either way."""
    ids_BS = torch.randint(1, 37, (ROWS, LENGTH), generator=torch.Generator().manual_seed(seed))
    ids_BS[:, 0] = torch.arange(ROWS) + 1 + ROWS * (seed % 2)
    return ids_BS


@dataclass
class Observed:
    causal: bool = True
    batch_invariant: bool = True
    exact_budget: bool = True
    padding_inert: bool = True


def executed(model, ids_BS, mask_BS=None, causal=False):
    """Logits (B, S, V), and the executed weights of all routers side by side (B, S, R * E)."""
    with torch.no_grad():
        out = model(ids_BS, attention_mask=mask_BS, causal_routing=causal, output_routings=True, use_cache=False)
    dense = [routing.assignment.to_dense().view(*ids_BS.shape, -1) for routing in out.routings]
    return out.logits, torch.cat(dense, -1)


def same(one, two):
    return all(torch.allclose(a, b, atol=2e-5) for a, b in zip(one, two, strict=True))


def observe(model, trials=4, causal=False):
    """Edit later tokens, other rows and padding, and look at logits and executed weights that must not change."""
    held = Observed()
    for trial in range(trials):
        ids_BS, other_BS = ids_of(2 * trial), ids_of(2 * trial + 1)
        whole = executed(model, ids_BS, causal=causal)
        later = executed(model, torch.cat([ids_BS[:, :CUT], other_BS[:, CUT:]], 1), causal=causal)
        prefix = executed(model, ids_BS[:, :CUT], causal=causal)
        head = [x[:, :CUT] for x in whole]
        held.causal &= same(head, [x[:, :CUT] for x in later])
        alone = executed(model, ids_BS[:1], causal=causal)
        others = executed(model, torch.cat([ids_BS[:1], other_BS[1:]]), causal=causal)
        held.batch_invariant &= same(alone, [x[:1] for x in whole]) and same(alone, [x[:1] for x in others])
        if held.batch_invariant:  # otherwise a shorter batch is also another batch
            held.causal &= same(head, prefix)
        held.exact_budget &= bool((whole[1] > 0).sum() == (executed(model, other_BS, causal=causal)[1] > 0).sum())
        held.padding_inert &= same(whole, _without_padding(model, ids_BS, other_BS, causal))
    return held


def _without_padding(model, ids_BS, other_BS, causal):
    """The batch with padding on the right whose content is arbitrary, cut to what it was."""
    padded_BS = torch.cat([ids_BS, other_BS[:, :4]], 1)
    mask_BS = torch.ones_like(padded_BS)
    mask_BS[:, LENGTH:] = 0
    return [x[:, :LENGTH] for x in executed(model, padded_BS, mask_BS, causal)]


@pytest.mark.parametrize("name", NAMES)
def test_properties_are_those_observed_on_the_model(name):
    model = built(name)
    declared, observed = method_properties(model.config), observe(model)
    assert observed == Observed(declared.causal, declared.batch_invariant, declared.exact_budget)
    leaks = not (declared.causal and declared.batch_invariant)
    assert bool(declared.decode_twin) == leaks
    twin = observe(model, trials=2, causal=True)
    assert (twin.causal, twin.batch_invariant, twin.padding_inert) == (True, True, True)


@pytest.mark.parametrize("name", NAMES)
def test_it_learns_generates_and_survives_saving(name, tmp_path):
    model = built(name)
    ids_BS = ids_of(99)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        out = model(ids_BS, labels=ids_BS)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.lm_loss.item())
    assert losses[-1] < losses[0] - 0.3
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    without = [name for name, p in model.named_parameters() if id(p) in trained and p.grad is None]
    assert not without, f"no gradient reaches {without}"
    model.eval()
    model.save_pretrained(tmp_path)
    loaded = CrosswaysForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(executed(model, ids_BS)[0], executed(loaded, ids_BS)[0])
    tokens = [m.generate(ids_BS, max_new_tokens=4, do_sample=False) for m in (model, loaded)]
    assert torch.equal(*tokens)
    assert tokens[0].shape == (ROWS, LENGTH + 4)


@pytest.mark.parametrize("name", NAMES)
def test_generation_with_a_cache_is_generation_without(name):
    model = built(name)
    ids_BS = ids_of(5)
    with_cache, without = (
        model.generate(ids_BS, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_says_where_it_comes_from(name):
    method = find_method(name)
    assert "20" in method.paper
    assert method.equation
    assert method.model
    assert yaml.safe_load(recipe_lines(method)) == {"model": method.model}
    assert recipe_lines(method).count("\n") == len(method.model)
    parts = method_parts(method_config(method))
    assert list(parts) == ["gate", "score", "select", "sharing", "layer"]
    assert all(line and documentation for line, documentation in parts.values())


def test_no_two_entries_are_the_same_configuration():
    made = [method_config(method).to_diff_dict() for method in methods().values()]
    assert all(one != two for index, one in enumerate(made) for two in made[:index])


def test_the_observation_finds_false_claims():
    """The leaky methods are caught by the same test that passes the honest ones."""
    assert not observe(built("usmoe")).causal
    assert not observe(built("usmoe-scratch")).batch_invariant
    assert observe(built("usmoe-scratch")).causal


def test_names_nobody_knows_are_refused():
    with pytest.raises(UserError, match=r"unknown method 'usmo' \(did you mean 'usmoe'\?\)"):
        find_method("usmo")
    with pytest.raises(UserError, match="unknown selection"):
        method_config(Method(title="t", paper="p", equation="e", model={"select": {"name": "none"}}))
