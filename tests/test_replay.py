"""Decisions recorded in one pass and executed in another, weighed anew."""

from __future__ import annotations

import pytest
import torch

from crossways.errors import UserError
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.perturb import DisableTop, RandomLogits, perturbed
from crossways.replay import Decisions, recorded, replayed

SIZES = {
    "vocab_size": 37,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
RULES = {
    "top_k": {"select": {"name": "top_k", "k": 2}, "renormalize": True, "weight_scale": 2.5},
    "softmax": {"renormalize": "softmax"},
    "float64": {"router_dtype": "float64", "score": "sigmoid", "bias_update_rate": 0.1},
    "top_c": {"select": {"name": "top_c", "k": 1.5}, "score": "unified"},
    "expert_choice": {"select": {"name": "expert_choice", "k": 2}},
    "positive": {"select": "positive", "score": "relu", "sparsity_budget": 2.0},
    "capacity": {"select": {"name": "capacity", "k": 2, "factor": 0.5}, "load_balance_pairs": "asked"},
    "dropout": {"expert_dropout": 0.5},
    "decision": {"sharing": {"name": "decision", "size": 2}},
    "cartesian": {"layer": "cartesian", "gate": "residual"},
    "ternary": {"negated_experts": True, "zero_experts": 2, "renormalize": "with_zero"},
}


@pytest.fixture(params=RULES)
def fields(request):
    return RULES[request.param]


def model_of(seed=0, **fields):
    torch.manual_seed(seed)
    return CrosswaysForCausalLM(CrosswaysConfig(**(SIZES | {"load_balance_coef": 0.01} | fields))).train()


def text(seed=0):
    return torch.randint(1, 37, (3, 9), generator=torch.Generator().manual_seed(seed))


def masks(out):
    return [routing.assignment.to_mask() for routing in out.routings]


def test_the_same_weights_give_the_same_output_and_gradients(fields):
    ids_BS = text()
    plain, again = model_of(**fields), model_of(**fields)
    with recorded(plain) as decisions:
        first = plain(ids_BS, labels=ids_BS, output_routings=True)
    first.loss.backward()
    with replayed(again, decisions):
        second = again(ids_BS, labels=ids_BS, output_routings=True)
    second.loss.backward()
    torch.testing.assert_close(second.loss, first.loss)
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(again.get_parameter(name).grad, parameter.grad, msg=name)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(again.get_buffer(name), buffer, rtol=1e-5, atol=1e-12, msg=name, equal_nan=True)
    assert again.model.replay is None


def test_other_weights_execute_what_was_recorded_and_weigh_it_themselves(fields):
    ids_BS = text()
    old = model_of(0, **fields)
    with recorded(old) as decisions:
        then = old(ids_BS, output_routings=True)
    other = model_of(1, **fields)
    by_itself = masks(other(ids_BS, output_routings=True))
    assert any(not torch.equal(mask_TE, old_TE) for mask_TE, old_TE in zip(by_itself, masks(then), strict=True))
    with replayed(other, decisions):
        now = other(ids_BS, labels=ids_BS, output_routings=True)
    for mask_TE, wanted_TE in zip(masks(now), masks(then), strict=True):
        assert torch.equal(mask_TE, wanted_TE)
    for routing, router in zip(now.routings, other.model.routers, strict=True):
        pairs = routing.assignment
        raw = pairs.with_weights(routing.scores_TE[pairs.token_P, pairs.expert_P])
        torch.testing.assert_close(pairs.weight_P, router.weighted(raw, routing.scores_TE).weight_P)
    assert [load.tolist() for load in now.expert_load] == [load.tolist() for load in then.expert_load]
    now.lm_loss.backward()
    assert sum(float(p.grad.abs().sum()) for p in other.model.gates.parameters() if p.grad is not None) > 0


def test_gradient_checkpointing_repeats_each_pass_after_the_context_has_ended(fields):
    texts = [text(0), text(1)]
    old = model_of(0, **fields)
    with recorded(old) as decisions:
        for ids_BS in texts:
            old(ids_BS)
    grads = []
    for checkpointed in (False, True):
        model = model_of(1, **fields)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with replayed(model, decisions):
            losses = [model(ids_BS, labels=ids_BS).loss for ids_BS in texts]
        model(text(2))  # decides for itself
        sum(losses).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_padding_is_left_out():
    ids_BS = text()
    mask_BS = torch.ones_like(ids_BS)
    mask_BS[0, :4] = 0
    model = model_of()
    with recorded(model) as decisions:
        model(ids_BS)
    with replayed(model, decisions):
        out = model(ids_BS, attention_mask=mask_BS, output_routings=True)
    for routing in out.routings:
        assert torch.equal(routing.assignment.experts_per_token_T(), 2 * mask_BS.flatten())


def test_a_generated_text_is_replayed_as_one_pass():
    model = model_of(0).eval()
    with recorded(model) as decisions:
        ids_BS = model.generate(text()[:, :5], max_new_tokens=4, do_sample=False)
    assert len(decisions.passes) == 4
    whole = decisions.joined()
    trained = model_of(1)
    with replayed(trained, whole), recorded(trained) as seen:
        trained(ids_BS[:, :-1], labels=ids_BS[:, :-1]).loss.backward()  # the last token was never routed
    first, last = decisions.passes[0].decided_R[0], decisions.passes[-1].decided_R[0]
    for decided in (whole.passes[0].decided_R[0], seen.passes[0].decided_R[0]):
        executed_BSE = torch.zeros(3, 8, 4, dtype=torch.bool)
        executed_BSE.flatten(0, 1)[decided.token_P.long(), decided.expert_P.long()] = True
        prompt_BSE, end_BE = executed_BSE[:, :5].reshape(15, 4), executed_BSE[:, 7]
        assert set(prompt_BSE.nonzero().unbind(1)[0].tolist()) == set(range(15))
        assert torch.equal(prompt_BSE.nonzero(), torch.stack(sorted_pairs(first), 1))
        assert torch.equal(end_BE.nonzero(), torch.stack(sorted_pairs(last), 1))


def sorted_pairs(decided):
    order = (decided.token_P.long() * 100 + decided.expert_P).argsort()
    return decided.token_P.long()[order], decided.expert_P.long()[order]


def test_what_a_perturbation_forbids_is_not_replayed():
    model, ids_BS = model_of(), text()
    with recorded(model) as decisions:
        model(ids_BS)
    with replayed(model, decisions), perturbed(model, DisableTop()):
        out = model(ids_BS, output_routings=True)
    assert all((routing.assignment.experts_per_token_T() == 1).all() for routing in out.routings)


def test_what_cannot_be_replayed_is_refused():
    model, ids_BS = model_of(), text()
    with pytest.raises(ValueError, match="nothing was recorded"), recorded(model):
        pass
    with recorded(model) as decisions:
        model(ids_BS)
    with pytest.raises(UserError, match="recorded on other tokens"), replayed(model, decisions):
        model(text(1))
    embedded = Decisions([type(decisions.passes[0])(decisions.passes[0].decided_R)])
    with pytest.raises(UserError, match=r"shape \(3, 9\), this one is \(3, 8\)"), replayed(model, embedded):
        model(ids_BS[:, 1:])
    with replayed(model, decisions):
        model(ids_BS)
        with pytest.raises(UserError, match="more forward passes"):
            model(ids_BS)
    with pytest.raises(ValueError, match="1 of 1 recorded passes were not replayed"), replayed(model, decisions):
        pass
    with pytest.raises(UserError, match="decisions of 3 routers"), replayed(model_of(num_hidden_layers=2), decisions):
        pass
    with pytest.raises(UserError, match="holds 0 routed decoders"), replayed(torch.nn.Linear(1, 1), decisions):
        pass
    with pytest.raises(UserError, match="equally many rows"):
        Decisions().joined()
    assert model.model.replay is None
    model(ids_BS)


@pytest.mark.parametrize("bias", [0.0, 3.0])
def test_random_logits_level_or_tilt_the_loads_of_a_training_step(bias):
    model = model_of(num_hidden_layers=1, max_position_embeddings=512)
    model.model.gates[0].weight.data[0] += 5.0  # by itself it is far from level
    ids_BS = torch.randint(1, 37, (4, 512))
    with perturbed(model, RandomLogits(bias)):
        out = model(ids_BS, labels=ids_BS)
        out.loss.backward()
    (load_E,) = out.expert_load
    spread = float(load_E.float().std() / load_E.float().mean())
    assert spread < 0.1 if bias == 0 else spread > 0.2
    assert model.model.gates[0].weight.grad.abs().sum() > 0
    with pytest.raises(UserError, match="bias must be at least 0"):
        RandomLogits(-1.0)


def test_random_logits_are_drawn_again_alike_under_gradient_checkpointing():
    grads = []
    for checkpointed in (False, True):
        model = model_of()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        with perturbed(model, RandomLogits(1.0)):
            model(text(), labels=text()).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    for again, first in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(again, first)
