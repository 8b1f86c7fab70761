"""What a model learns without gradients: the balancing bias and ReMoE's penalty, when and only when they should."""

from __future__ import annotations

import pytest
import torch

from crossways.errors import UserError
from crossways.evaluation.cost import count_parameters, mean_budget
from crossways.evaluation.evaluate import leak_reason
from crossways.gates import LinearGate
from crossways.models import CrosswaysForCausalLM
from crossways.models.convert import to_qwen2_moe
from crossways.router import Router, Sparsity
from crossways.rules.balance import load_balance_loss
from crossways.rules.score import Sigmoid
from crossways.rules.select import TopK

DEEPSEEK = {
    "score": "sigmoid",
    "select": {"name": "group_limited", "k": 2, "n_group": 2, "topk_group": 1},
    "renormalize": True,
    "weight_scale": 2.5,
    "bias_update_rate": 0.01,
}
REMOE = {"score": "relu", "select": "positive", "sparsity_budget": 1, "initializer_range": 0.3}


def biases(model):
    return torch.stack([router.bias for router in model.model.routers])


def coefs(model):
    return [router.sparsity_coef.item() for router in model.model.routers]


def test_the_bias_moves_against_the_load_in_training(tiny_model, tokens):
    model = tiny_model(calibrated=False, **DEEPSEEK).train()
    assert not biases(model).any()
    output = model(tokens[0], attention_mask=tokens[1])
    for router, load_E in zip(model.model.routers, output.expert_load, strict=True):
        load_E = load_E.float()
        torch.testing.assert_close(router.bias, 0.01 * torch.sign(load_E.mean() - load_E))
    assert biases(model).any()
    model(tokens[0])
    assert (biases(model).abs() <= 0.02 + 1e-6).all()


def test_the_bias_stays_outside_training(tiny_model, tokens):
    model = tiny_model(**DEEPSEEK)
    before = biases(model).clone()
    assert before.any()
    model(tokens[0], labels=tokens[0])
    model.generate(tokens[0], max_new_tokens=3)
    model.train()
    with torch.no_grad():
        model(tokens[0])
    model.generate(tokens[0], max_new_tokens=3)
    assert torch.equal(biases(model), before)
    model(tokens[0])
    assert not torch.equal(biases(model), before)


def test_the_bias_moves_once_a_step_under_gradient_checkpointing(tiny_model, tokens):
    moved = []
    for checkpointing in (False, True):
        model = tiny_model(calibrated=False, **DEEPSEEK).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(tokens[0], labels=tokens[0], use_cache=False).loss.backward()
        moved.append(biases(model).clone())
    assert torch.equal(*moved)
    assert moved[0].abs().max().item() == pytest.approx(0.01)


def test_the_bias_chooses_but_does_not_weigh(tiny_model, tokens):
    model = tiny_model(**DEEPSEEK | {"renormalize": False, "weight_scale": 1.0})
    with torch.no_grad():
        model.model.routers[0].bias.copy_(torch.tensor([0.0, 0.0, 5.0, 5.0]))
    routing = model(tokens[0], output_routings=True).routings[0]
    assert routing.assignment.load_E().tolist() == [0, 0, 27, 27]
    torch.testing.assert_close(routing.assignment.to_dense()[:, 2:], routing.scores_TE[:, 2:])
    torch.testing.assert_close(routing.scores_TE, routing.logits_TE.sigmoid())


def test_the_bias_balances_a_skewed_router():
    torch.manual_seed(0)
    gate = LinearGate(8, 4)
    gate.weight.data.normal_()
    router = Router(4, Sigmoid(), TopK(1), gate=gate, bias_update_rate=0.005).train()
    x_BSD = torch.randn(4, 64, 8) + 2 * gate.weight.data[0]  # expert 0 is favoured
    before = router(x_BSD).assignment.load_E()
    for _ in range(400):
        router.observe(router(x_BSD))
    after = router(x_BSD).assignment.load_E()
    assert before.max() > 120
    assert after.max() < 90
    assert after.min() > 40


def test_the_bias_is_saved_and_stays_float32(tiny_model, tmp_path):
    model = tiny_model(**DEEPSEEK)
    model.save_pretrained(tmp_path)
    again = CrosswaysForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(biases(again), biases(model))
    assert biases(again).dtype == torch.float32


def test_the_penalty_follows_the_density_by_hand():
    sparsity = Sparsity(target=0.25)
    assert sparsity.change(torch.tensor(0.5)).item() == pytest.approx(1.2)
    assert sparsity.change(torch.tensor(0.1)).item() == pytest.approx(1 / 1.2)
    assert sparsity.change(torch.tensor(0.25)).item() == 1.0
    assert sparsity.change(torch.tensor(torch.nan)).item() == 1.0


def test_all_routers_share_one_penalty_weight_and_the_loss_uses_the_old_one(tiny_model, tokens):
    model = tiny_model(calibrated=False, **REMOE).train()
    assert coefs(model) == pytest.approx([1e-8, 1e-8])
    output = model(tokens[0], attention_mask=tokens[1], labels=tokens[0], output_routings=True)
    density = torch.stack([routing.density() for routing in output.routings]).mean()
    pairs = sum(int(load_E.sum()) for load_E in output.expert_load)
    assert density.item() == pytest.approx(pairs / (2 * 4 * int(tokens[1].sum())))
    assert coefs(model) == pytest.approx([1e-8 * (1.2 if density > 0.25 else 1 / 1.2)] * 2)
    used = [float(routing.sparsity_coef) for routing in output.routings]
    assert used == pytest.approx([1e-8, 1e-8])


def test_the_penalty_is_averaged_over_routers(tiny_model, tokens):
    output = tiny_model(calibrated=False, **REMOE | {"sparsity_coef_start": 3.0})(tokens[0], labels=tokens[0])
    assert output.aux_losses["sparsity"].all()
    torch.testing.assert_close(output.loss - output.lm_loss, 3 * output.aux_losses["sparsity"].mean())


def test_the_density_is_that_of_all_routers_together(tiny_model, tokens):
    model = tiny_model(calibrated=False, **REMOE | {"sparsity_budget": 0.4}).train()
    with torch.no_grad():
        model.model.gates[1].weight.zero_()  # executes nothing, but the mean is still above a tenth
    model(tokens[0])
    assert coefs(model) == pytest.approx([1.2e-8, 1.2e-8])


def test_zero_computation_experts_weigh_less_in_the_balance_loss(tiny_model, tokens):
    fields = {"copy_experts": 1, "constant_experts": 1, "load_balance_coef": 0.1, "zero_computation_balance": 0.25}
    output = tiny_model(**fields)(tokens[0], labels=tokens[0], output_routings=True)
    share_E = torch.tensor([1, 1, 1, 1, 0.25, 0.25])
    expected = [load_balance_loss(r.logits_TE, r.assignment, share_E=share_E) for r in output.routings]
    torch.testing.assert_close(output.aux_losses["load_balance"], torch.stack(expected))


def test_every_fixed_loss_is_added_with_its_weight(tiny_model, tokens):
    coefs = {"load_balance": 0.1, "sequence_balance": 0.2, "importance": 0.3, "entropy": 0.4, "router_z": 0.5}
    fields = {f"{name}_loss_coef" if name == "router_z" else f"{name}_coef": coef for name, coef in coefs.items()}
    output = tiny_model(**fields)(tokens[0], labels=tokens[0])
    assert output.aux_losses.keys() == coefs.keys()
    total = sum(coefs[name] * loss_R.sum() for name, loss_R in output.aux_losses.items())
    torch.testing.assert_close(output.loss - output.lm_loss, total)


def test_the_penalty_weight_moves_in_training_alone(tiny_model, tokens):
    model = tiny_model(**REMOE)
    before = coefs(model)
    model(tokens[0], labels=tokens[0])
    model.generate(tokens[0], max_new_tokens=2)
    assert coefs(model) == before
    model.train().gradient_checkpointing_enable()
    model(tokens[0], labels=tokens[0], use_cache=False).loss.backward()
    assert coefs(model)[0] in (pytest.approx(before[0] * 1.2), pytest.approx(before[0] / 1.2))


def test_remoe_reaches_its_budget(tiny_model):
    torch.manual_seed(0)
    ids_BS = torch.randint(1, 37, (2, 16))
    fields = REMOE | {"sparsity_coef_start": 1e-3, "sparsity_coef_growth": 1.3, "num_hidden_layers": 1}
    model = tiny_model(calibrated=False, **fields).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    budgets = []
    for _ in range(80):
        output = model(ids_BS, labels=ids_BS)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        budgets.append(int(output.expert_load[0].sum()) / 32)
    assert budgets[0] > 1.5
    assert sum(budgets[-20:]) / 20 == pytest.approx(1.0, abs=0.25)


def test_expert_dropout_acts_in_training_alone(tiny_model, tokens):
    model = tiny_model(calibrated=False, select={"name": "top_k", "k": 4}, expert_dropout=0.5)
    assert model(tokens[0]).expert_load[0].sum() == 4 * 27
    assert 27 < model.train()(tokens[0]).expert_load[0].sum() < 3 * 27


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"select": {"name": "capacity"}}, ["later tokens"]),
        ({"select": {"name": "sinkhorn", "group": "batch"}}, ["later tokens", "other rows"]),
        ({"score": "token_softmax"}, ["later tokens"]),
        (
            {"score": {"name": "unified", "expert_part": "softmax_over_tokens", "group": "batch"}},
            ["later", "other rows"],
        ),
        ({"score": {"name": "unified", "alpha": 1.0, "expert_part": "softmax_over_tokens"}}, []),
        ({"select": {"name": "top_p", "p": 0.4}}, []),
        ({"score": "relu", "select": "positive"}, []),
        ({"score": "token_softmax", "causal_routing": True}, []),
    ],
    ids=str,
)
def test_leaks_of_scores_and_selections_are_named(tiny_config, fields, words):
    reason = leak_reason(tiny_config(**fields))
    assert bool(reason) == bool(words)
    assert all(word in reason for word in words)


def test_costs_of_the_new_methods(tiny_config):
    assert mean_budget(tiny_config(select={"name": "capacity", "k": 2})) == 2
    assert mean_budget(tiny_config(select="base")) == 1
    assert mean_budget(tiny_config(**REMOE)) == 1
    for select in ({"name": "top_p", "p": 0.4}, {"name": "positive"}, {"name": "threshold", "value": 0.1}):
        with pytest.raises(UserError, match="depends on the text"):
            mean_budget(tiny_config(select=select))
    # an expert of D = 16, F = 8 has 3 * 16 * 8 weights; k = 2 of 4 + 4 choices run a quarter of the 4 experts
    plain, plus = tiny_config(), tiny_config(zero_experts=1, copy_experts=1, constant_experts=2)
    weights = 3 * 16 * 8
    extra = 2 * (2 * 3 * 16 + 4 * 16)  # two layers: constants with their blends, and four more rows of the gate
    assert count_parameters(plus).total - count_parameters(plain).total == extra
    assert count_parameters(plus).active - count_parameters(plain).active == extra - 2 * weights


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"copy_experts": 1}, "zero-computation"),
        ({"qk_norm": True}, "queries and keys"),
        ({"bias_update_rate": 0.1}, "biased"),
        ({"select": {"name": "capacity"}}, "selection"),
        ({"score": "token_softmax"}, "score"),
    ],
    ids=str,
)
def test_what_a_family_cannot_express_is_refused(tiny_model, fields, words):
    with pytest.raises(UserError, match=words):
        to_qwen2_moe(tiny_model(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_scale": 0.0},
        {"weight_scale": float("nan")},
        {"expert_dropout": 1.0},
        {"expert_dropout": -0.1},
        {"zero_experts": -1},
        {"sparsity_budget": 5},
        {"sparsity_coef_growth": 1.0},
        {"sparsity_coef_start": 0.0},
        {"entropy_coef": -1.0},
        {"router_input": "input"},
        {"zero_computation_balance": -0.5},
        {"select": {"name": "top_k", "k": 5}},
        {"select": {"name": "group_limited", "k": 2, "n_group": 3, "topk_group": 1}},
    ],
    ids=str,
)
def test_impossible_values_are_refused(tiny_config, fields):
    with pytest.raises(UserError):
        tiny_config(**fields)
    assert tiny_config(select={"name": "top_k", "k": 5}, copy_experts=1).router_size == 5
