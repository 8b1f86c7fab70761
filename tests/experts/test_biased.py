"""Experts with biases: numbers by hand, the formula written out, every backend with every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from crossways.assignment import Assignment
from crossways.experts import Activation, Experts, backends, compute_experts, why_not
from crossways.experts.biased import Biases

CPU = torch.device("cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
LEAVES = ("x", "weight", "up", "down", "up_bias", "down_bias")


def ragged_mask():
    """Experts 1 and 3 have no token, token 0 has no expert."""
    mask_TE = torch.rand(23, 5, generator=torch.Generator().manual_seed(0)) < 0.4
    mask_TE[:, [1, 3]] = False
    mask_TE[0] = False
    return mask_TE


MASKS = {
    "ragged": ragged_mask(),
    "one-token": torch.tensor([[False] + [True] * 7]),  # enough weights that not all of their gradients cancel
    "nobody": torch.zeros(4, 3, dtype=torch.bool),
    "no-tokens": torch.zeros(0, 3, dtype=torch.bool),
}


def make_leaves(mask_TE, gated, dtype=torch.float64, width=16, expert_width=24):
    """Values exact in bfloat16, so that every dtype computes the same problem."""
    generator = torch.Generator().manual_seed(1)
    tokens, experts = mask_TE.shape
    rows = expert_width * (2 if gated else 1)
    shapes = (
        (tokens, width),
        (int(mask_TE.sum()),),
        (experts, rows, width),
        (experts, width, expert_width),
        (experts, rows),
        (experts, width),
    )
    scales = (1, 1, width**-0.5, expert_width**-0.5, 1, 1)
    return [
        (torch.randn(shape, generator=generator) * scale).bfloat16().to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def by_formula(mask_TE, leaves, activation):
    """sum over e of w_e (down_e act(up_e x + a_e) + b_e), a token and an expert at a time."""
    x, weight, up, down, up_bias, down_bias = leaves
    matrix_TE = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(weight).to_dense()
    rows = []
    for t in range(len(x)):
        row_D = x[t] * 0
        for e in range(len(up)):
            hidden_F = activation((up[e] @ x[t] + up_bias[e])[None])[0]
            row_D = row_D + matrix_TE[t, e] * (down[e] @ hidden_F + down_bias[e])
        rows.append(row_D)
    return torch.stack(rows) if rows else x * 1


def gradients(y, leaves):
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, grad_y, allow_unused=True)]


def computed(mask_TE, leaves, activation, backend):
    x, weight, up, down, *biases = leaves
    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(weight)
    return gradients(compute_experts(x, assignment, up, down, activation, backend, Biases(*biases)), leaves)


@pytest.mark.parametrize("backend", ["naive", "loop", "fused"])
def test_numbers_by_hand(backend):
    if reason := why_not(backend, CPU, torch.float32):
        pytest.skip(reason)
    # Width 1. Expert 0: relu(2x - 3) * 5 + 7; expert 1: relu(-x + 1) * 2 - 4. Token 0 (x = 4): half of the first.
    # Token 1 (x = -1): a quarter of the first, whose relu is closed, and three quarters of the second.
    assignment = Assignment.from_topk(
        torch.tensor([[0, 1], [0, 1]]), torch.tensor([[0.5, 0.0], [0.25, 0.75]]), num_experts=2
    )
    y_TD = compute_experts(
        torch.tensor([[4.0], [-1.0]]),
        assignment,
        torch.tensor([[[2.0]], [[-1.0]]]),
        torch.tensor([[[5.0]], [[2.0]]]),
        Activation("relu"),
        backend,
        Biases(torch.tensor([[-3.0], [1.0]]), torch.tensor([[7.0], [-4.0]])),
    )
    # 0.5 (5 * 5 + 7) = 16; 0.25 (0 + 7) + 0.75 (2 * 2 - 4) = 1.75
    torch.testing.assert_close(y_TD, torch.tensor([[16.0], [1.75]]))


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_every_backend_is_the_formula_with_every_gradient(case, activation):
    mask_TE, act = MASKS[case], Activation(activation)
    leaves = make_leaves(mask_TE, act.gated)
    expected = gradients(by_formula(mask_TE, leaves, act), leaves)
    tested = set()
    for dtype, tolerance in TOLERANCE.items():
        for backend in backends():
            if why_not(backend, CPU, dtype) is not None:
                continue
            tested.add(backend)
            actual = computed(mask_TE, make_leaves(mask_TE, act.gated, dtype), act, backend)
            for name, ours, theirs in zip(("y", *LEAVES), actual, expected, strict=True):
                wanted = torch.zeros_like(ours) if theirs is None else theirs  # where nobody chose, no graph either
                error, scale = (ours.double() - wanted.double()).norm(), wanted.double().norm()
                assert error <= tolerance * scale, f"{backend} {dtype} {name}: {error / scale:.2e}"
    assert {"naive", "loop", "grouped_mm", "transformers:batched_mm"} <= tested


@pytest.mark.parametrize("width", [1, 3, 8, 13])
def test_widths_that_are_no_multiples_of_anything(width):
    mask_TE, act = MASKS["ragged"], Activation("swiglu")
    expected = computed(mask_TE, make_leaves(mask_TE, True, width=width), act, "naive")
    for backend in ("loop", "fused", "transformers:batched_mm"):
        if why_not(backend, CPU, torch.float64) is None:
            actual = computed(mask_TE, make_leaves(mask_TE, True, width=width), act, backend)
            for ours, theirs in zip(actual, expected, strict=True):
                torch.testing.assert_close(ours, theirs)


def test_autocast_takes_the_biases_along():
    mask_TE, act = MASKS["ragged"], Activation("swiglu")
    with torch.autocast("cpu", torch.bfloat16):
        low = computed(mask_TE, make_leaves(mask_TE, True, torch.float32), act, "loop")
    expected = computed(mask_TE, make_leaves(mask_TE, True, torch.float32), act, "naive")
    for ours, theirs in zip(low, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


@pytest.mark.parametrize(
    ("activation", "names"),
    [("swiglu", ("gate_up_proj", "gate_up_proj_bias")), ("gelu", ("up_proj", "up_proj_bias"))],
)
def test_the_module_names_them_as_transformers_does_and_starts_them_at_zero(activation, names):
    experts = Experts(3, 6, 4, activation, bias=True)
    assert set(experts.state_dict()) == {*names, "down_proj", "down_proj_bias"}
    assert not getattr(experts, names[1]).any()
    assert not experts.down_proj_bias.any()
    assert "bias=True" in repr(experts)
    plain = Experts(3, 6, 4, activation)
    plain.load_state_dict({name: value for name, value in experts.state_dict().items() if "bias" not in name})
    assignment = Assignment.from_topk(torch.tensor([[0, 2], [1, 0]]), torch.rand(2, 2), 3)
    x_TD = torch.randn(2, 6)
    torch.testing.assert_close(experts(x_TD, assignment), plain(x_TD, assignment))
    torch.nn.init.normal_(experts.down_proj_bias)
    expected_TD = plain(x_TD, assignment) + assignment.to_dense() @ experts.down_proj_bias
    torch.testing.assert_close(experts(x_TD, assignment), expected_TD)


def test_it_is_gpt_oss_with_another_activation():
    """Against transformers' own loop over experts, whose activation, layout and nothing else is replaced."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    config = GptOssConfig(hidden_size=8, intermediate_size=6, num_local_experts=3, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    theirs = GptOssExperts(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    theirs._apply_gate = Activation("swiglu")
    ours = Experts(3, 8, 6, bias=True)
    with torch.no_grad():
        ours.gate_up_proj.copy_(theirs.gate_up_proj.mT)
        ours.down_proj.copy_(theirs.down_proj.mT)
        ours.gate_up_proj_bias.copy_(theirs.gate_up_proj_bias)
        ours.down_proj_bias.copy_(theirs.down_proj_bias)
    x_TD, index_TK, weight_TK = torch.randn(5, 8), torch.tensor([[0, 2]] * 5), torch.rand(5, 2)
    expected_TD = theirs(x_TD, index_TK, weight_TK)
    torch.testing.assert_close(ours(x_TD, Assignment.from_topk(index_TK, weight_TK, 3)), expected_TD)


def test_biases_that_do_not_fit_are_refused():
    x, _, up, down, up_bias, down_bias = make_leaves(MASKS["ragged"], True)
    assignment = Assignment.from_mask(MASKS["ragged"], torch.ones(23, 5))
    for wrong in (
        Biases(up_bias[:, :3], down_bias),
        Biases(up_bias, down_bias[:2]),
        Biases(up_bias.float(), down_bias),
    ):
        with pytest.raises(ValueError, match="do not fit expert weights, which need"):
            compute_experts(x, assignment, up, down, Activation("swiglu"), biases=wrong)


def test_slack_gets_no_bias():
    mask_TE = MASKS["ragged"]
    leaves = make_leaves(mask_TE, True, torch.float32)
    x, _, up, down, *biases = leaves
    slack = Assignment.from_bounded_mask(mask_TE, torch.rand(mask_TE.shape), most=int(mask_TE.sum()) + 9)
    assert slack.slack
    arguments = up, down, Activation("swiglu")
    expected = compute_experts(x, slack.compact(), *arguments, "naive", Biases(*biases))
    for backend in ("fused", "grouped_mm"):
        if why_not(backend, CPU, torch.float32) is None:
            actual = compute_experts(x, slack, *arguments, backend, Biases(*biases))
            torch.testing.assert_close(actual, expected)
    assert functional.mse_loss(expected[0], torch.zeros(16)) == 0  # token 0 chose nobody
