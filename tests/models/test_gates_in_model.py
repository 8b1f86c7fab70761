"""Gates and sharing plans at work in a whole model: who decides, who learns, what survives saving."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from crossways.errors import UserError
from crossways.sharing import PerBlock

BLOCK = {"num_hidden_layers": 4, "sharing": {"name": "block", "size": 2}}


def routings(model, tokens, **kwargs):
    return model(tokens[0], attention_mask=tokens[1], output_routings=True, **kwargs).routings


def test_one_decision_per_block_is_executed_in_every_layer(tiny_model, tokens):
    model = tiny_model(num_hidden_layers=5, sharing={"name": "decision", "size": 2}, initializer_range=0.5)
    asked: list = []
    for index, gate in enumerate(model.model.gates):
        gate.register_forward_pre_hook(lambda _, args, index=index: asked.append(index))
    decided = routings(model, tokens)
    assert asked == [0, 1, 2]
    assert [r.reused for r in decided] == [False, True, False, True, False]
    for first, second in ((0, 1), (2, 3)):
        ours, theirs = decided[first].assignment, decided[second].assignment
        assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert not torch.equal(decided[1].assignment.to_mask(), decided[2].assignment.to_mask())


def test_each_cartesian_factor_repeats_its_own_decision(tiny_model, tokens):
    model = tiny_model(layer="cartesian", num_hidden_layers=2, sharing={"name": "decision", "size": 2})
    first, second, first_again, second_again = routings(model, tokens)
    assert first_again.reused
    assert second_again.reused
    assert torch.equal(first.assignment.to_dense(), first_again.assignment.to_dense())
    assert torch.equal(second.assignment.to_dense(), second_again.assignment.to_dense())
    assert not torch.equal(first.assignment.to_mask(), second.assignment.to_mask())


def test_a_decision_for_all_layers_skips_dense_ones(tiny_model, tokens):
    model = tiny_model(num_hidden_layers=4, moe_every=2, sharing={"name": "decision", "size": 2})
    first, second = routings(model, tokens)
    assert torch.equal(first.assignment.to_dense(), second.assignment.to_dense())


def test_blocks_of_one_decide_for_themselves(tiny_model, tokens):
    ours, theirs = tiny_model(sharing={"name": "decision", "size": 1}), tiny_model(sharing="layer")
    assert torch.equal(ours(tokens[0]).logits, theirs(tokens[0]).logits)


def test_a_repeated_decision_has_its_losses_once(tiny_model, tokens):
    coefficients = {"load_balance_coef": 0.1, "router_z_loss_coef": 0.1}
    model = tiny_model(num_hidden_layers=4, sharing={"name": "decision", "size": 2}, **coefficients)
    output = model(tokens[0], labels=tokens[0])
    assert {name: len(loss_R) for name, loss_R in output.aux_losses.items()} == {"load_balance": 2, "router_z": 2}
    assert len(output.expert_load) == 4


def test_the_causal_twin_of_a_repeated_decision(tiny_model, tokens):
    """Layers that never decide have no cutoff and need none."""
    fields = {"sharing": {"name": "decision", "size": 2}, "select": {"name": "top_c", "k": 1.5}}
    model = tiny_model(num_hidden_layers=4, **fields)
    first, second, *_ = routings(model, tokens, causal_routing=True)
    assert torch.equal(first.assignment.to_dense(), second.assignment.to_dense())
    assert model.generate(tokens[0], max_new_tokens=2).shape == (3, 11)


def test_the_gate_learns_from_all_layers_that_repeat_its_decision(tiny_model, tokens):
    model = tiny_model(num_hidden_layers=2, sharing={"name": "decision", "size": 2}).train()
    torch.nn.init.zeros_(model.model.layers[0].mlp.experts.down_proj)  # the first layer's experts give nothing
    model(tokens[0], labels=tokens[0]).loss.backward()
    assert model.model.gates[0].weight.grad.any()


def test_block_shared_xmoe_is_a_composition(tiny_model, tokens):
    model = tiny_model(gate={"name": "cosine", "dim": 3}, **BLOCK)
    assert [type(gate).__name__ for gate in model.model.gates] == ["CosineGate"] * 2
    inputs: list = []
    model.model.gates[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    decided = routings(model, tokens)
    assert len(inputs) == 2  # layers 3 and 4, each on its own hidden state
    for x_BSD, routing in zip(tuple(inputs), decided[2:], strict=True):
        torch.testing.assert_close(routing.logits_TE, model.model.gates[1](x_BSD).flatten(0, 1))
        assert routing.logits_TE.abs().max() <= 1 / model.model.gates[1].temperature


def test_low_rank_terms_are_one_per_layer_of_the_block(tiny_model, tokens):
    model = tiny_model(num_hidden_layers=3, gate="low_rank", sharing={"name": "block", "size": [2, 1]})
    assert [gate.up_LER.shape[0] for gate in model.model.gates] == [2, 1]
    plain = tiny_model(num_hidden_layers=3, sharing={"name": "block", "size": [2, 1]})
    shared = {f"model.gates.{index}.weight": gate.weight for index, gate in enumerate(model.model.gates)}
    plain.load_state_dict(
        {**{n: w for n, w in model.state_dict().items() if "gates" not in n}, **shared}, strict=True
    )
    torch.testing.assert_close(model(tokens[0]).logits, plain(tokens[0]).logits)
    before = routings(model, tokens)
    torch.nn.init.normal_(model.model.gates[0].up_LER[1])
    after = routings(model, tokens)
    assert torch.equal(before[0].logits_TE, after[0].logits_TE)
    assert not torch.equal(before[1].logits_TE, after[1].logits_TE)


def test_a_gate_is_built_for_the_layers_that_ask_it(tiny_model):
    model = tiny_model(num_hidden_layers=4, gate="low_rank", sharing={"name": "decision", "size": 4})
    assert [gate.up_LER.shape[0] for gate in model.model.gates] == [1]


def test_recurrent_state_flows_within_a_block_and_factor(tiny_model, tokens):
    fields = {"gate": {"name": "recurrent", "state_size": 5}, "layer": "cartesian", "num_hidden_layers": 3}
    model = tiny_model(sharing={"name": "block", "size": [2, 1]}, **fields)
    inputs: dict = {}
    for index, gate in enumerate(model.model.gates):
        gate.register_forward_pre_hook(lambda _, args, index=index: inputs.setdefault(index, []).append(args))
    decided = routings(model, tokens)
    states = [r.state for r in decided]  # layer 0 factors 0 and 1, layer 1 factors 0 and 1, layer 2
    for factor in (0, 1):
        first, second = (context for _, context in inputs[factor])
        assert (first.layer, second.layer) == (0, 1)
        assert second.previous.state is states[factor]
    last = inputs[2][0][1]
    assert last.layer == 0  # a new block: what the gate is handed, it does not use
    fresh = model.model.gates[2](inputs[2][0][0])
    torch.testing.assert_close(decided[4].logits_TE, fresh.logits_BSE.flatten(0, 1))


def test_routing_of_a_recurrent_model_does_not_look_ahead(tiny_model, tokens):
    model = tiny_model(gate={"name": "recurrent", "state_size": 5}, sharing="all", num_hidden_layers=3)
    edited = tokens[0].clone()
    edited[:, 5:] = 1
    ours, theirs = (model(ids, output_routings=True).routings for ids in (tokens[0], edited))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.state[:, :5], other.state[:, :5])


@pytest.mark.parametrize("gate", ["hash", {"name": "stable", "freeze_after": 1}])
def test_embeddings_cannot_be_hashed(tiny_model, tokens, gate):
    model = tiny_model(gate=gate)
    with pytest.raises(UserError, match="call the model with input_ids instead of inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(tokens[0]))


def test_hashing_routes_every_occurrence_of_a_token_alike(tiny_model, tokens):
    model = tiny_model(gate="hash")
    for gate, routing in zip(model.model.gates, routings(model, tokens), strict=True):
        mask_BSE = routing.assignment.to_mask().view(3, 9, 4)
        named_BSE = torch.zeros_like(mask_BSE).scatter(-1, gate.table_VK[tokens[0]], True)
        assert torch.equal(mask_BSE, named_BSE & tokens[1].bool()[..., None])
    assert not torch.equal(model.model.gates[0].table_VK, model.model.gates[1].table_VK)


FROZEN = {
    "hash": ("hash", ["table_VK"]),
    "random": ("random", ["weight"]),
    "stable": ({"name": "stable", "freeze_after": 0, "dim": 5}, ["words_VR", "centroids_ER"]),
}


@pytest.mark.parametrize("kind", FROZEN)
def test_frozen_gates_are_not_trained_nor_decayed(tiny_model, tokens, kind):
    spec, names = FROZEN[kind]
    model = tiny_model(gate=spec, load_balance_coef=0.1).train()
    before = [getattr(gate, name).detach().clone() for gate in model.model.gates for name in names]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(tokens[0], labels=tokens[0]).loss.backward()
        optimizer.step()
    after = [getattr(gate, name) for gate in model.model.gates for name in names]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_stable_gates_change_stage_after_the_given_passes(tiny_model, tokens):
    fields = {"score": "sigmoid", "select": {"name": "top_k", "k": 1}, "load_balance_coef": 0.1}
    model = tiny_model(False, gate={"name": "stable", "freeze_after": 2, "dim": 5}, **fields).train()
    seen = []
    for _ in range(4):
        output = model(tokens[0], labels=tokens[0], output_routings=True)
        seen.append((sorted(output.aux_losses), [r.fixed for r in output.routings]))
    assert seen == [(["gate", "load_balance"], [False] * 2)] * 2 + [([], [True] * 2)] * 2
    assert model.model.training_passes == 4
    for routing in output.routings:  # the second stage: a token id has one expert, whatever is around it
        chosen_T, ids_T = routing.assignment.top_expert_T(), tokens[0].flatten()
        assert all(chosen_T[ids_T == token].unique().numel() == 1 for token in ids_T.unique())


def test_the_distillation_loss_is_weighted_and_summed_over_routers(tiny_model, tokens):
    model = tiny_model(False, gate={"name": "stable", "freeze_after": 9}, gate_loss_coef=0.5).train()
    output = model(tokens[0], labels=tokens[0])
    assert output.aux_losses["gate"].shape == (2,)
    torch.testing.assert_close(output.loss, output.lm_loss + 0.5 * output.aux_losses["gate"].sum())
    assert "gate" not in model.eval()(tokens[0], labels=tokens[0]).aux_losses


def test_distillation_learns_to_name_the_backbones_choice(tiny_model, tokens):
    model = tiny_model(False, gate={"name": "stable", "freeze_after": 10**6}).train()
    losses = []
    optimizer = torch.optim.Adam([p for g in model.model.gates for p in (g.words_VR, g.centroids_ER)], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        output = model(tokens[0], labels=tokens[0])
        output.loss.backward()
        optimizer.step()
        losses.append(output.aux_losses["gate"].sum().item())
    assert losses[-1] < 0.5 * losses[0]


SCHEDULE = {"select": {"name": "scheduled_top_k", "k": 1, "k_end": 4, "steps": 3}, "gate": "random"}


def executed(model, ids_BS):
    """Experts per token in each router."""
    return [int(load_E.sum()) / ids_BS.numel() for load_E in model(ids_BS).expert_load]


def test_smoe_dropout_raises_k_in_training_alone(tiny_model, tokens, tmp_path):
    model = tiny_model(False, **SCHEDULE)
    ids_BS = tokens[0]
    assert executed(model, ids_BS) == [1, 1]
    assert executed(model, ids_BS) == [1, 1]  # evaluation does not count
    model.train()
    with torch.no_grad():
        assert executed(model, ids_BS) == [1, 1]  # nor does sampling
    assert [executed(model, ids_BS)[0] for _ in range(5)] == [1, 2, 3, 4, 4]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.model.training_passes == 5
    assert executed(again, ids_BS) == [4, 4]
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.training_passes == 5


def test_a_checkpoint_without_a_count_starts_from_zero(tiny_model, tokens, tmp_path):
    tiny_model(False, gate="random").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, select=SCHEDULE["select"])
    assert model.model.training_passes == 0
    assert executed(model, tokens[0]) == [1, 1]


def test_only_scheduled_models_count(tiny_model):
    assert "model.training_passes" not in tiny_model().state_dict()
    assert "model.training_passes" in tiny_model(**SCHEDULE).state_dict()


def test_unequal_blocks_in_a_model(tiny_model, tiny_config, tokens):
    model = tiny_model(num_hidden_layers=3, sharing={"name": "block", "size": [1, 2]})
    assert len(model.model.gates) == 2
    assert model.config.gate_plan == PerBlock([1, 2]).plan(3)
    assert tiny_config(moe_every=0, sharing={"name": "block", "size": [1, 2]}).gate_plan == []  # dense: no blocks
    assert model(tokens[0]).logits.isfinite().all()


def test_gates_may_start_smaller_than_the_rest(tiny_model):
    model = tiny_model(False, hidden_size=32, router_initializer_range=0.01)
    assert model.model.gates[0].weight.std().item() == pytest.approx(0.01, rel=0.3)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.3, rel=0.1)
