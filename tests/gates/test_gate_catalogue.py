"""What holds for every gate: shapes, dtypes, gradients, determinism, no look at other tokens, refusals."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from crossways.errors import UserError
from crossways.gates import Gate, build_gate, gate_catalogue
from crossways.gates.probe import check_gate
from crossways.router import Router
from crossways.routing import Context, GateOutput
from crossways.rules.score import Softmax
from crossways.rules.select import TopK

WIDTH, EXPERTS, LAYERS, VOCAB = 8, 4, 3, 11
SPECS = {
    "cosine": {"name": "cosine"},
    "cosine_usmoe": {
        "name": "cosine",
        "dim": 8,
        "temperature": 1.0,
        "learn_temperature": False,
        "normalize_input": False,
        "embedding_norm": 1.5,
    },
    "cosine_unprojected": {"name": "cosine", "project": False, "learn_temperature": False, "normalize_input": False},
    "hash": {"name": "hash", "k": 2},
    "hash_balanced": {"name": "hash", "k": 2, "balanced": True},
    "linear": {"name": "linear"},
    "linear_bias": {"name": "linear", "bias": True},
    "low_rank": {"name": "low_rank", "rank": 2},
    "mlp": {"name": "mlp", "width": 5},
    "noisy": {"name": "noisy", "zero_init": False},
    "random": {"name": "random"},
    "recurrent": {"name": "recurrent", "state_size": 5},
    "recurrent_shared": {"name": "recurrent", "state_size": 5, "shared_projection": True, "shared_head": True},
    "residual": {"name": "residual"},
    "stable": {"name": "stable", "freeze_after": 2, "dim": 5},
}
WITHOUT_PARAMETERS = {"hash", "hash_balanced", "random"}


def gate_of(kind, seed=0):
    torch.manual_seed(seed)
    gate = build_gate(SPECS[kind]).build(WIDTH, EXPERTS, LAYERS, VOCAB)
    gate.reset_parameters(std=0.5)
    if kind == "low_rank":
        torch.nn.init.normal_(gate.up_LER)
    gate.count_tokens(torch.randint(9, (VOCAB,)))
    return gate


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = [torch.randn(2, 6, WIDTH, generator=generator) for _ in range(LAYERS)]
    return states, torch.randint(VOCAB, (2, 6), generator=generator)


def routings(gate, states, ids_BS, step=0):
    """What a softmax top-2 router decides with the gate, layer by layer."""
    router, previous, all_layers = Router(EXPERTS, Softmax(), TopK(2), gate=gate), None, []
    for layer, x_BSD in enumerate(states):
        previous = router(x_BSD, Context(token_ids_BS=ids_BS, layer=layer, previous=previous, step=step))
        all_layers.append(previous)
    return all_layers


def test_every_gate_is_among_those_tested():
    assert set(gate_catalogue()) == {spec["name"] for spec in SPECS.values()}


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("training", [True, False])
def test_logits_are_float32_in_bfloat16_and_under_autocast(kind, training):
    gate = gate_of(kind).to(torch.bfloat16).train(training)
    states, ids_BS = inputs()
    context = Context(token_ids_BS=ids_BS)

    def say():
        torch.manual_seed(1)
        out = gate(states[0].bfloat16(), context)
        return out if isinstance(out, GateOutput) else GateOutput(out)

    alone = say()
    with torch.autocast("cpu", torch.bfloat16):
        under = say()
    for field in ("logits_BSE", "choice_BSE", "state", "loss"):
        said, again = getattr(alone, field), getattr(under, field)
        assert (said is None) == (again is None)
        if said is not None:
            assert said.dtype == torch.float32
            assert torch.equal(said, again)  # autocast computes nothing in lower precision
    assert alone.logits_BSE.shape == (2, 6, EXPERTS)


@pytest.mark.parametrize("kind", SPECS)
def test_no_gate_looks_at_other_tokens(kind):
    for step in (0, 5):
        check_gate(gate_of(kind), WIDTH, VOCAB, LAYERS, step)


@pytest.mark.parametrize(
    ("look", "message"),
    [
        (lambda x_BSD: x_BSD - x_BSD.mean(1, keepdim=True), "later tokens in layer 0"),
        (lambda x_BSD: x_BSD - x_BSD.mean(0, keepdim=True), "other rows in layer 0"),
        (lambda x_BSD: x_BSD * x_BSD.shape[0], "the number of rows in layer 0"),
        (lambda x_BSD: x_BSD - x_BSD[:, 5:].mean(1, keepdim=True), "later tokens in layer 0"),
        (lambda x_BSD: torch.cat([x_BSD[:1], x_BSD[1:] + x_BSD[:1]]), "other rows in layer 0"),
    ],
    ids=["mean_over_sequence", "other_rows", "batch_size", "last_token", "first_row"],
)
def test_the_probe_finds_gates_that_look_around(look, message):
    class Peeping(Gate):
        def forward(self, x_BSD, context=None):
            return look(x_BSD)[..., :EXPERTS]

    with pytest.raises(ValueError, match=message):
        check_gate(Peeping(), WIDTH, VOCAB)


@pytest.mark.parametrize("kind", SPECS)
def test_the_same_seed_gives_the_same_gate_and_another_seed_another(kind):
    states, ids_BS = inputs()
    first, again, other = (routings(gate_of(kind, seed).eval(), states, ids_BS)[-1].logits_TE for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", SPECS)
def test_evaluation_is_deterministic_and_changes_nothing(kind):
    gate = gate_of(kind).eval()
    before, (states, ids_BS) = copy.deepcopy(gate.state_dict()), inputs()
    one, two = (routings(gate, states, ids_BS)[-1] for _ in range(2))
    assert torch.equal(one.logits_TE, two.logits_TE)
    assert torch.equal(one.assignment.to_dense(), two.assignment.to_dense())
    assert all(torch.equal(value, before[name]) for name, value in gate.state_dict().items())


@pytest.mark.parametrize("kind", SPECS)
def test_gradients_reach_every_parameter_and_the_input(kind):
    gate = gate_of(kind).train()
    assert bool(list(gate.parameters())) == (kind not in WITHOUT_PARAMETERS)
    states, ids_BS = inputs()
    for x_BSD in states:
        x_BSD.requires_grad_()
    decided = routings(gate, states, ids_BS)
    loss = sum((r.assignment.to_dense() * torch.randn(12, EXPERTS)).sum() for r in decided)
    loss += sum(r.gate_loss for r in decided if r.gate_loss is not None)
    if kind.startswith("hash"):
        assert not loss.requires_grad
        return
    loss.backward()
    for name, parameter in gate.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    assert all(x_BSD.grad.any() for x_BSD in states)


@pytest.mark.parametrize("kind", SPECS)
def test_state_survives_saving(kind):
    gate, other = gate_of(kind, 0).eval(), gate_of(kind, 1).eval()
    other.load_state_dict(gate.state_dict(), strict=True)
    states, ids_BS = inputs()
    for ours, theirs in zip(routings(gate, states, ids_BS), routings(other, states, ids_BS), strict=True):
        assert torch.equal(ours.logits_TE, theirs.logits_TE)
        assert torch.equal(ours.assignment.to_dense(), theirs.assignment.to_dense())


@pytest.mark.parametrize("kind", SPECS)
def test_gates_build_without_memory(kind):
    with torch.device("meta"):
        gate = build_gate(SPECS[kind]).build(WIDTH, EXPERTS, LAYERS, VOCAB)
    assert all(tensor.is_meta for tensor in itertools.chain(gate.parameters(), gate.buffers()))


@pytest.mark.parametrize(
    ("kind", "weights"),
    [
        ("linear", 4 * 8),
        ("random", 4 * 8),
        ("hash", 0),
        ("noisy", 2 * 4 * 8),
        ("mlp", 5 * 8 + 4 * 5),
        ("cosine", 2 * 8 + 4 * 2),
        ("cosine_unprojected", 4 * 8),
        ("low_rank", 4 * 8 + 2 * 8 + 4 * 2),
        ("recurrent", 5 * 8 + 2 * 15 * 5 + 4 * 5),
        ("recurrent_shared", 5 * 8 + 2 * 15 * 5 + 4 * 5),
        ("stable", 4 * 8 + 4 * 5),
    ],
)
def test_weights_that_one_pass_multiplies_by(kind, weights):
    assert gate_of(kind).weights_per_token() == weights


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "linear", "bias": 1}, "bias must be true or false"),
        ({"name": "cosine", "dim": 0}, "dim must be a whole number of at least 1, got 0"),
        ({"name": "cosine", "temperature": 0}, "temperature must be a number above 0"),
        ({"name": "cosine", "embedding_norm": -1}, "embedding_norm must be a number above 0"),
        ({"name": "cosine", "normalize_input": "no"}, "normalize_input must be true or false"),
        ({"name": "low_rank", "rank": 1.5}, "rank must be a whole number"),
        ({"name": "recurrent", "state_size": True}, "state_size must be a whole number"),
        ({"name": "recurrent", "shared_head": 1}, "shared_head must be true or false"),
        ({"name": "random", "scale": "big"}, "scale must be a number above 0"),
        ({"name": "noisy", "zero_init": 0}, "zero_init must be true or false"),
        ({"name": "mlp", "width": 0}, "width must be a whole number of at least 1"),
        ({"name": "hash", "k": 0}, "k must be a whole number of at least 1"),
        ({"name": "stable", "freeze_after": -1}, "freeze_after must be a whole number of at least 0"),
        ({"name": "stable"}, "freeze_after"),
        ({"name": "cosin"}, "did you mean 'cosine'"),
        ({"name": "low_rank", "ranks": 2}, "did you mean 'rank'"),
    ],
    ids=str,
)
def test_impossible_gates_are_refused_in_one_line(spec, message):
    with pytest.raises(UserError, match=message) as error:
        build_gate(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["hash", "stable"])
def test_gates_of_token_ids_say_what_they_lack(kind):
    with pytest.raises(UserError, match="build it with vocab_size"):
        build_gate(SPECS[kind]).build(WIDTH, EXPERTS)
    with pytest.raises(UserError, match="call the model with input_ids"):
        gate_of(kind)(torch.randn(1, 2, WIDTH))
    with pytest.raises(UserError, match="call the model with input_ids"):
        gate_of(kind)(torch.randn(1, 2, WIDTH), Context())
