"""Families that hand over their choice in ways of their own: with shared experts, with a pass, to all experts.

Legend: T tokens, E experts, N shared experts, D model width.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from crossways import reroute
from crossways.perturb import LogitNoise, perturbed
from crossways.surgery.find import UnknownRoutingError, find_blocks
from crossways.surgery.handle import handle_of
from crossways.surgery.probe import read_router


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs, use_cache=False)[0]


def told(module, into):
    """Hook that keeps what a module is called with."""

    def hook(_, args, kwargs):
        into.append([*args, *kwargs.values()])

    return module.register_forward_pre_hook(hook, with_kwargs=True)


@pytest.mark.parametrize("renormalize", [None, False])
@pytest.mark.parametrize(("rule", "score"), [("top-c", nn.Sigmoid()), ("usmoe", None)])
def test_shared_experts_are_weighed_with_the_chosen_ones(make, batch, rule, score, renormalize):
    """Inkling: under one sum, times the constant and the parameter, whatever was chosen; by hand."""
    model, inputs = make("inkling"), batch("left")
    block, given, shared = model.model.layers[1].mlp, [], []
    hooks = [told(block.shared_experts, shared), told(block.gate, given)]
    with reroute(model, rule, k=1.5, renormalize=renormalize) as handle:
        logits_of(model, inputs)
    for hook in hooks:
        hook.remove()
    (x_TD,), (_, said_TN) = given[0], shared[0]
    logits_TX = x_TD.reshape(-1, 32) @ block.gate.weight.T
    score_TX = score(logits_TX) if score else 0.5 * logits_TX.softmax(-1) + 0.5 * 2 / 10 * logits_TX.sigmoid()
    pairs = handle.blocks[1].routing.assignment
    mask_TE = pairs.to_mask()
    assert pairs.num_pairs == 14 + 9
    weight_TE, weight_TN = score_TX[:, :8] * mask_TE, score_TX[:, 8:]
    if renormalize is None:
        sum_T1 = weight_TE.sum(-1, keepdim=True) + weight_TN.sum(-1, keepdim=True)
        weight_TE, weight_TN = weight_TE / sum_T1, weight_TN / sum_T1
    factor = block.gate.global_scale
    assert factor != 1
    torch.testing.assert_close(pairs.to_dense(), weight_TE * 8.0)
    torch.testing.assert_close(said_TN.reshape(weight_TN.shape), weight_TN * 8.0 * factor)


def test_shared_experts_learn_through_the_choice(make, batch):
    model = make("inkling").train()
    with reroute(model, "usmoe"):
        model(**batch(), use_cache=False).logits.square().mean().backward()
    gradient_XD = model.model.layers[0].mlp.gate.weight.grad
    assert (gradient_XD[8:].abs().sum(-1) > 0).all()


def test_a_score_that_compares_tokens_does_not_fit_shared_experts(make):
    with pytest.raises(ValueError, match="shared experts"):
        reroute(make("inkling"), select="top_c", score="token_softmax")


def test_a_pass_is_one_more_expert_and_computes_nothing(make, batch):
    """ZAYA: what chose to skip is not handed to the experts, and what it hands the next layer stays."""
    model, inputs = make("zaya"), batch()
    blocks = [layer.mlp for layer in model.model.layers]
    plain, seen = logits_of(model, inputs), []
    for rule, changes in (("own", {}), ("top-c", {"k": 2})):
        with reroute(model, rule, **changes) as handle:
            states, given = [], []
            hooks = [told(block.experts, given) for block in blocks]
            hooks.append(blocks[0].gate.register_forward_hook(lambda _, x, said, into=states: into.append(said)))
            logits = logits_of(model, inputs)
            assert states[0][2].max() <= 8, "an index that the experts do not know, not even as an empty place"
            seen.append((handle.loads(), given, states[0][3], logits))
            for hook in hooks:
                hook.remove()
    (own, own_given, own_state, own_logits), (loads, given, state, _) = seen
    assert torch.equal(own_logits, plain)
    assert torch.equal(state, own_state), "the state for the next layer follows from the choice"
    assert all(len(load_E) == 9 and load_E[8] > 0 for load_E in (*own, *loads)), "the test needs some that skip"
    assert [int(load_E.sum()) for load_E in (*own, *loads)] == [18, 18, 36, 36]
    assert all(index_TK.numel() == 18 for _, index_TK, _ in own_given)  # expert 0 times zero, where it skips
    for load_E, (_, index_TK, weight_TK) in zip(loads, given, strict=True):
        computed_TK = index_TK < 8
        assert torch.equal(index_TK[computed_TK].bincount(minlength=8), load_E[:8])
        assert (weight_TK[computed_TK] > 0).all()
        assert not weight_TK[~computed_TK].any()
    assert "1 of the 9 compute nothing" in str(handle.blocks[0].reading)


def test_experts_that_hand_on_their_input_cost_nothing(make, batch):
    """LongCat-Flash: fill places that nobody wants, with a weight of zero."""
    model, inputs = make("longcat_flash"), batch("left")
    given = []
    with reroute(model, "usmoe", k=0.5) as handle:  # mostly one expert each, which its code by itself cannot take
        hook = told(model.model.layers[0].mlp.experts, given)
        logits_of(model, inputs)
        hook.remove()
        (_, index_TK, weight_TK), load_E = given[0], handle.loads()[0]
    assert handle.blocks[0].reading.free == 2
    assert index_TK.shape[1] >= 2
    assert int(load_E.sum()) == 5 + 3
    assert torch.equal(index_TK[weight_TK > 0].bincount(minlength=10), load_E)
    assert (index_TK[weight_TK == 0] >= 8).all(), "an expert that computes was made to for nothing"


def test_attention_experts_stay(make):
    """JetMoE chooses experts for queries as well: as many as there are heads for."""
    with reroute(make("jetmoe"), "usmoe") as handle:
        assert [site.block.name for site in handle.blocks] == ["model.layers.0.mlp", "model.layers.1.mlp"]
        assert [left.block for left in handle.left] == [f"model.layers.{i}.self_attention.experts" for i in (0, 1)]
        assert "heads of an attention" in handle.left[0].note


def test_experts_that_are_given_everything_compute_the_chosen_pairs(make, batch):
    """Llama 4: rows of the matrix products, and E(p x) for each pair by hand."""
    model, inputs = make("llama4_text"), batch("left")
    experts = model.model.layers[1].feed_forward.experts
    plain, rows, given, said = logits_of(model, inputs), [], [], []
    hooks = [
        experts.act_fn.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel())),
        experts.register_forward_hook(lambda _, args, out: given.append(args[0])),
        experts.register_forward_hook(lambda _, args, out: said.append(out)),
    ]
    with reroute(model, "own"):
        assert torch.equal(logits_of(model, inputs), plain)
    assert rows == [8 * 18], "the own rule is left to the family"
    with reroute(model, "usmoe", k=1.5) as handle:
        logits_of(model, inputs)
        rows.clear()
        routed = logits_of(model, inputs)
        load_E = handle.loads()[1]
        assert sum(rows) == int(load_E.sum()) == 14 + 9
        assert len(rows) == int((load_E > 0).sum())
        pairs = handle.blocks[1].routing.assignment
    for hook in hooks:
        hook.remove()
    whole_RD = type(experts).forward(experts, given[-1])
    torch.testing.assert_close(said[-1], whole_RD, rtol=1e-4, atol=1e-5)
    chosen_ET = pairs.to_mask().t()
    assert not said[-1].view(8, 18, 32)[~chosen_ET].any()
    assert "forward" not in vars(experts)
    assert torch.equal(logits_of(model, inputs), plain)
    assert not torch.equal(routed, plain)


def test_what_llama_4_computes_has_the_same_gradients(make, batch):
    model, inputs = make("llama4_text").train(), batch("left")
    found = []
    for everything in (True, False):
        model.zero_grad()
        with reroute(model, "usmoe", k=1.5) as handle:
            for site in handle.blocks:
                site._chosen_only.understood = False if everything else None
            model(**inputs, use_cache=False).logits[inputs["attention_mask"].bool()].square().mean().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_experts_of_which_nothing_is_not_nothing_go_on_computing_everything(make, batch):
    """E(0) must be zero for leaving out to be right; here it is not, as the activation is not."""
    model, inputs = make("llama4_text"), batch()
    for layer in model.model.layers:
        layer.feed_forward.experts.act_fn = nn.Sigmoid()
        layer.feed_forward.experts.register_parameter("shift", nn.Parameter(torch.ones(8, 1)))
        plain = type(layer.feed_forward.experts).forward
        kind = type("Shifted", (type(layer.feed_forward.experts),), {"forward": lambda s, x, f=plain: f(s, x) + 1})
        layer.feed_forward.experts.__class__ = kind
    with reroute(model, "usmoe") as handle:
        logits_of(model, inputs)
        assert [site._chosen_only.understood for site in handle.blocks] == [False, False]


class Doubled(nn.Module):
    """What adapters do to weights."""

    def forward(self, weight):
        return weight * 2


def test_adapted_weights_are_those_that_compute(make, batch):
    """As adapters on stacked experts do: the weights of a call are made of those of the module."""
    model, inputs = make("llama4_text"), batch("left")
    found = []
    for everything in (True, False):
        twin = copy.deepcopy(model)
        with reroute(twin, "usmoe", k=1.5) as handle:
            for site in handle.blocks:
                nn.utils.parametrize.register_parametrization(site.block.experts, "down_proj", Doubled())
                site._chosen_only.understood = False if everything else None
            found.append(logits_of(twin, inputs))
            assert all(site._chosen_only.understood is not everything for site in handle.blocks)
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    with reroute(model, "usmoe", k=1.5):
        assert not torch.allclose(logits_of(model, inputs), found[0])


@pytest.mark.parametrize("order", ["before", "after"])
def test_accelerate_may_wrap_the_same_experts(make, batch, order):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model, inputs = make("llama4_text"), batch("left")
    plain = logits_of(model, inputs)
    experts = model.model.layers[1].feed_forward.experts
    handle = reroute(model, "usmoe", k=1.5) if order == "after" else None
    add_hook_to_module(experts, AlignDevicesHook(execution_device="cpu"))
    handle = handle or reroute(model, "usmoe", k=1.5)
    rows = []
    hook = experts.act_fn.register_forward_hook(lambda _, args, out: rows.append(out.shape[:-1].numel()))
    logits_of(model, inputs)
    rows.clear()
    logits_of(model, inputs)
    hook.remove()
    assert sum(rows) == 23
    handle.undo()
    assert torch.equal(logits_of(model, inputs), plain)
    remove_hook_from_module(experts)
    assert torch.equal(logits_of(model, inputs), plain)


def test_copies_of_a_model_of_such_experts(make, batch):
    model, inputs = make("llama4_text"), batch("left")
    with reroute(model, "usmoe"):
        routed = logits_of(model, inputs)
        twin = copy.deepcopy(model)
        ours = twin.model.layers[0].feed_forward.experts.forward
        assert ours is handle_of(twin).blocks[0]._chosen_only
        assert ours.module is twin.model.layers[0].feed_forward.experts
    assert torch.equal(logits_of(twin, inputs), routed)


@pytest.mark.parametrize("name", ["inkling", "zaya", "dbrx", "jetmoe", "longcat_flash", "llama4_text"])
def test_nobody_is_chosen_and_nothing_breaks(make, batch, name):
    model, inputs = make(name), batch("left")
    with reroute(model, select={"name": "threshold", "value": 50.0}) as handle:
        assert logits_of(model, inputs)[inputs["attention_mask"].bool()].isfinite().all()
        assert sum(int(load_E.sum()) for load_E in handle.loads()) == 0


@pytest.mark.parametrize("name", ["inkling", "zaya", "dbrx", "jetmoe", "longcat_flash", "llama4_text"])
def test_perturbed_as_it_routes(make, batch, name):
    model, inputs = make(name), batch("left")
    real = inputs["attention_mask"].bool()
    before = logits_of(model, inputs)
    with perturbed(model, LogitNoise(1e-6)):
        torch.testing.assert_close(logits_of(model, inputs)[real], before[real], rtol=1e-3, atol=1e-4)
    with perturbed(model, LogitNoise(2.0)):
        assert not torch.allclose(logits_of(model, inputs)[real], before[real], rtol=1e-3, atol=1e-4)
    assert torch.equal(logits_of(model, inputs), before)


def test_a_number_that_is_a_parameter_is_not_taken_for_a_constant(make):
    model = make("inkling")
    reading = read_router(find_blocks(model)[0])
    assert reading.weight_scale == pytest.approx(8.0)
    assert reading.factor == "gate.global_scale"


def with_forward(gate, change):
    """The same router, but for what it returns."""
    kind = type(gate)
    gate.__class__ = type(kind.__name__, (kind,), {"forward": lambda *args, **kw: change(kind.forward(*args, **kw))})


def test_what_follows_from_the_choice_in_an_unknown_way_is_refused(make):
    zaya = make("zaya")
    gate = zaya.model.layers[1].mlp.gate
    with_forward(gate, lambda said: (*said[:3], said[3] + said[2].reshape(1, -1, 1)))
    with pytest.raises(UnknownRoutingError, match="change with the choice"):
        reroute(zaya, "usmoe")
    inkling = make("inkling")
    with_forward(inkling.model.layers[1].mlp.gate, lambda said: (*said[:3], said[3] ** 2))
    with pytest.raises(UnknownRoutingError, match="none of the"):
        reroute(inkling, "usmoe")
