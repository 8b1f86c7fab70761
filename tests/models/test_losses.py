"""The training loss: its parts, padding, and gradient accumulation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from crossways.errors import UserError
from crossways.models import CrosswaysForCausalLM
from crossways.models.losses import AUXILIARY_LOSSES, auxiliary_losses, share_of_step
from crossways.rules.balance import (
    balance_product,
    communication_balance_loss,
    device_balance_loss,
    excess_load_loss,
    importance_loss,
    load_balance_loss,
    load_loss,
    mutual_information_loss,
    router_z_loss,
    sequence_entropy_loss,
)
from crossways.rules.select import TopK


def masked_labels(ids_BS, mask_BS):
    return ids_BS.masked_fill(mask_BS == 0, -100)


def test_the_loss_is_the_sum_of_its_parts(tiny_model, tokens):
    model = tiny_model(layer="cartesian", load_balance_coef=0.1, router_z_loss_coef=0.02)
    ids_BS, mask_BS = tokens
    labels_BS = masked_labels(ids_BS, mask_BS)
    output = model(ids_BS, attention_mask=mask_BS, labels=labels_BS, output_routings=True)
    cross = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels_BS[:, 1:].flatten())
    balance = [load_balance_loss(r.logits_TE, r.assignment, r.valid_T) for r in output.routings]
    z = [router_z_loss(r.logits_TE, r.valid_T) for r in output.routings]
    torch.testing.assert_close(output.lm_loss, cross)
    torch.testing.assert_close(output.aux_losses["load_balance"], torch.stack(balance))
    torch.testing.assert_close(output.aux_losses["router_z"], torch.stack(z))
    torch.testing.assert_close(output.loss, cross + 0.1 * sum(balance) + 0.02 * sum(z))
    assert len(balance) == 4  # two layers of two factors


def test_losses_without_a_coefficient_are_not_computed(tiny_model, tokens):
    output = tiny_model()(tokens[0], labels=tokens[0])
    assert output.aux_losses == {}
    assert torch.equal(output.loss, output.lm_loss)
    only_z = tiny_model(router_z_loss_coef=0.1)(tokens[0], labels=tokens[0])
    assert list(only_z.aux_losses) == ["router_z"]


def test_no_routers_no_auxiliary_loss(tiny_config):
    losses, total = auxiliary_losses((), tiny_config(moe_every=0, load_balance_coef=0.1))
    assert losses == {}
    assert total == 0


def test_padding_counts_in_no_loss(tiny_model, tokens):
    model = tiny_model(load_balance_coef=0.1, router_z_loss_coef=0.1)
    ids_BS, mask_BS = tokens[0], tokens[1].flip(1)  # on the right: what stands before a label predicts it
    labels_BS = masked_labels(ids_BS, mask_BS)
    other_BS = torch.where(mask_BS.bool(), ids_BS, 7)
    ours = model(ids_BS, attention_mask=mask_BS, labels=labels_BS)
    theirs = model(other_BS, attention_mask=mask_BS, labels=labels_BS)
    torch.testing.assert_close(ours.loss, theirs.loss)
    for name, loss_R in ours.aux_losses.items():
        torch.testing.assert_close(loss_R, theirs.aux_losses[name])


def test_share_of_the_step():
    labels_BS = torch.tensor([[9, 1, -100, 2], [9, -100, -100, 3]])  # three labels after the shift
    assert share_of_step(labels_BS, None) == 1.0
    assert share_of_step(labels_BS, 12).item() == pytest.approx(0.25)
    assert share_of_step(labels_BS, torch.tensor(6)).item() == pytest.approx(0.5)


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_accumulated_language_model_gradients_equal_one_large_batch(tiny_model, tokens):
    """Rows of unequal length: weighting each micro-batch alike would be wrong."""
    ids_BS, mask_BS = tokens
    labels_BS = masked_labels(ids_BS, mask_BS)
    whole = tiny_model().train()
    whole(ids_BS, attention_mask=mask_BS, labels=labels_BS).loss.backward()
    parts = tiny_model().train()
    total = (labels_BS[:, 1:] != -100).sum()
    for row in range(3):
        part = slice(row, row + 1)
        parts(
            ids_BS[part], attention_mask=mask_BS[part], labels=labels_BS[part], num_items_in_batch=total
        ).loss.backward()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, atol=1e-6, rtol=1e-4)


def test_accumulated_auxiliary_losses_are_averaged_by_labels(tiny_model, tokens):
    """Equal micro-batches, so that the z-loss, a mean over tokens, is exactly that of the large batch; the balance
    loss is not linear in the batch, but over two copies of one batch it must come out once, not twice."""
    ids_BS = tokens[0]
    whole = tiny_model(router_z_loss_coef=0.5).train()
    whole(ids_BS, labels=ids_BS).loss.backward()
    parts = tiny_model(router_z_loss_coef=0.5).train()
    total = ids_BS[:, 1:].numel()
    for row in range(3):
        parts(ids_BS[row : row + 1], labels=ids_BS[row : row + 1], num_items_in_batch=total).loss.backward()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(parts)[name], gradient, atol=1e-6, rtol=1e-4)
    once, twice = (tiny_model(load_balance_coef=0.5).train() for _ in range(2))
    once(ids_BS, labels=ids_BS).loss.backward()
    for _ in range(2):
        twice(ids_BS, labels=ids_BS, num_items_in_batch=2 * total).loss.backward()
    for name, gradient in gradients(once).items():
        torch.testing.assert_close(gradients(twice)[name], gradient, atol=1e-6, rtol=1e-4)


GROUPS = {"select": {"name": "group_limited", "k": 1, "n_group": 2, "topk_group": 1, "group_score": "max"}}
EACH = {
    "load_balance": (
        {"load_balance_coef": 0.5, "load_balance_temperature": 0.3},
        lambda r: load_balance_loss(r.logits_TE, r.assignment, r.valid_T, temperature=0.3),
    ),
    "sequence_entropy": (
        {"sequence_entropy_coef": 0.5},
        lambda r: sequence_entropy_loss(r.logits_TE, r.num_rows, r.valid_T),
    ),
    "mutual_information": (
        {"mutual_information_coef": 0.5},
        lambda r: mutual_information_loss(r.logits_TE, r.valid_T),
    ),
    "device_balance": (
        {"device_balance_coef": 0.5, **GROUPS},
        lambda r: device_balance_loss(r.logits_TE, r.assignment, 2, r.valid_T, r.num_rows),
    ),
    "communication_balance": (
        {"communication_balance_coef": 0.5, **GROUPS},
        lambda r: communication_balance_loss(r.logits_TE, r.assignment, 2, 1, r.valid_T, r.num_rows),
    ),
    "importance": ({"importance_coef": 0.5}, lambda r: importance_loss(r.assignment)),
    "load": (
        {"load_coef": 0.5, "gate": {"name": "noisy", "zero_init": False}},
        lambda r: load_loss(r.logits_TE, r.noise.clean, r.noise.scale, r.assignment, r.valid_T),
    ),
    "excess_load": (
        {"excess_load_coef": 0.5, "score": "sigmoid"},
        lambda r: excess_load_loss(r.logits_TE, r.assignment, r.valid_T),
    ),
}


@pytest.mark.parametrize("name", EACH)
def test_each_coefficient_weighs_its_own_loss(tiny_model, tokens, name):
    fields, loss = EACH[name]
    model = tiny_model(**fields).train()
    output = model(tokens[0], attention_mask=tokens[1], labels=tokens[0], output_routings=True)
    expected_R = torch.stack([loss(routing) for routing in output.routings])
    assert list(output.aux_losses) == [name]
    assert name in AUXILIARY_LOSSES
    torch.testing.assert_close(output.aux_losses[name], expected_R)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.5 * expected_R.sum())
    (output.loss - output.lm_loss).backward()
    assert all(p.grad.any() for gate in model.model.gates for p in gate.parameters())


def test_groups_by_themselves_for_selections_without_groups(tiny_model, tokens):
    model = tiny_model(device_balance_coef=0.5, expert_groups=2)
    output = model(tokens[0], labels=tokens[0], output_routings=True)
    expected_R = torch.stack(
        [device_balance_loss(r.logits_TE, r.assignment, 2, None, r.num_rows) for r in output.routings]
    )
    torch.testing.assert_close(output.aux_losses["device_balance"], expected_R)


def test_no_load_loss_without_noise(tiny_model, tokens):
    model = tiny_model(load_coef=0.5, importance_coef=0.1, gate="noisy")
    assert list(model.eval()(tokens[0], labels=tokens[0]).aux_losses) == ["importance"]
    assert list(model.train()(tokens[0], labels=tokens[0]).aux_losses) == ["importance", "load"]


@pytest.mark.parametrize("fields", [{"load_coef": 0.5, "gate": "noisy"}, {"router_jitter": 0.3}], ids=str)
def test_noise_is_the_same_when_activations_are_computed_again(tiny_model, tokens, fields):
    def gradients_of(recompute):
        model = tiny_model(False, **fields).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(tokens[0], labels=tokens[0]).loss.backward()
        return gradients(model)

    plain, again = gradients_of(False), gradients_of(True)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_the_balance_loss_may_take_the_layers_own_scores(tiny_model, tokens):
    model = tiny_model(load_balance_coef=0.5, load_balance_probs="scores", score="sigmoid")
    output = model(tokens[0], attention_mask=tokens[1], labels=tokens[0], output_routings=True)
    for routing, loss in zip(output.routings, output.aux_losses["load_balance"], strict=True):
        share_TE = (routing.logits_TE.sigmoid() / routing.logits_TE.sigmoid().sum(-1, keepdim=True))[routing.valid_T]
        load_E = routing.assignment.load_E() / routing.assignment.num_pairs
        torch.testing.assert_close(loss, 4 * (load_E * share_TE.mean(0)).sum())


@pytest.mark.parametrize(("pairs", "k"), [("asked", 2), ("first", 1)])
def test_the_balance_loss_may_count_before_anybody_is_dropped(tiny_model, tokens, pairs, k):
    select = {"name": "capacity", "k": 2, "factor": 0.5}
    model = tiny_model(load_balance_coef=0.5, load_balance_pairs=pairs, select=select).train()
    output = model(tokens[0], attention_mask=tokens[1], labels=tokens[0], output_routings=True)
    for routing, loss in zip(output.routings, output.aux_losses["load_balance"], strict=True):
        scores_BSE = routing.scores_TE.view(3, 9, 4)
        asked = TopK(k)(scores_BSE, scores_BSE, tokens[1].bool()[..., None].expand(3, 9, 4))
        assert asked.num_pairs == k * tokens[1].sum()
        assert routing.assignment.num_pairs < 2 * tokens[1].sum()
        expected = balance_product(asked.load_E(), asked.num_pairs, routing.logits_TE.softmax(-1), routing.valid_T)
        torch.testing.assert_close(loss, expected)
    no_limit = tiny_model(load_balance_coef=0.5, load_balance_pairs=pairs).train()
    output = no_limit(tokens[0], labels=tokens[0], output_routings=True)
    first = output.routings[0].logits_TE.argmax(-1).bincount(minlength=4)
    load_E = first if pairs == "first" else output.routings[0].assignment.load_E()
    expected = balance_product(load_E, load_E.sum(), output.routings[0].logits_TE.softmax(-1))
    torch.testing.assert_close(output.aux_losses["load_balance"][0], expected)


def test_the_balance_loss_may_count_a_whole_step(tiny_model, tokens):
    model = tiny_model(load_balance_coef=0.5, load_balance_scope="step").train()
    model.model.pass_is_step = False

    def balance(rows):
        output = model(tokens[0][rows], labels=tokens[0][rows], output_routings=True)
        return output.routings[0], output.aux_losses["load_balance"][0]

    one, _ = balance(slice(0, 1))
    two, loss = balance(slice(1, 3))
    load_E = one.assignment.load_E() + two.assignment.load_E()
    torch.testing.assert_close(loss, balance_product(load_E, load_E.sum(), two.logits_TE.softmax(-1)))
    model.model.finish_step()
    again, loss = balance(slice(1, 3))
    torch.testing.assert_close(loss, load_balance_loss(again.logits_TE, again.assignment))


def test_the_balance_loss_of_x_moe_takes_cosines_over_a_temperature_of_its_own(tiny_config):
    """arXiv 2204.09179, eq. 9: whatever the gate's temperature, softmax(cosines / 0.3)."""
    config = tiny_config(
        gate={"name": "cosine", "temperature": 0.07},
        load_balance_coef=1.0,
        load_balance_probs="cosine",
        load_balance_temperature=0.3,
    )
    model = CrosswaysForCausalLM(config).train()
    out = model(torch.randint(1, 37, (2, 5)), labels=torch.ones(2, 5, dtype=torch.long), output_routings=True)
    for loss, routing in zip(out.aux_losses["load_balance"], out.routings, strict=True):
        torch.testing.assert_close(routing.logits_TE * 0.07, routing.cosine_TE)
        share_E = routing.assignment.load_E() / routing.assignment.num_pairs
        expected = 4 * (share_E * (routing.cosine_TE / 0.3).softmax(-1).mean(0)).sum()
        torch.testing.assert_close(loss, expected)
    out.aux_losses["load_balance"][0].backward()  # later layers' inputs hang on the first one's temperature
    assert model.model.gates[0].temperature.grad == 0
    assert model.model.gates[0].embeddings.grad.abs().sum() > 0
    ids_BS = torch.ones(1, 3, dtype=torch.long)
    assert "load_balance" not in model.eval()(ids_BS, labels=ids_BS).aux_losses
    with pytest.raises(UserError, match="needs gate 'cosine'"):
        tiny_config(load_balance_probs="cosine")


def test_the_balance_loss_of_stable_moe_counts_who_was_asked_for(tiny_config):
    """The authors' code takes it before an expert that is full drops anybody."""
    select = {"name": "capacity", "k": 1, "factor": 0.5, "group": "batch"}
    model = CrosswaysForCausalLM(tiny_config(excess_load_coef=1.0, select=select, score="sigmoid")).train()
    ids_BS = torch.randint(1, 37, (2, 9))
    out = model(ids_BS, labels=ids_BS, output_routings=True)
    assert any(routing.asked.num_pairs > routing.assignment.num_pairs for routing in out.routings)
    for loss, routing in zip(out.aux_losses["excess_load"], out.routings, strict=True):
        torch.testing.assert_close(loss, excess_load_loss(routing.logits_TE, routing.asked))
