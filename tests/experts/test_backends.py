"""Every backend against `naive`: the output and every gradient, on assignments of every awkward kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from crossways.assignment import Assignment
from crossways.errors import UserError
from crossways.experts import Activation, backends, compute_experts, resolve_backend, why_not
from crossways.experts import loop as loop_module

CPU = torch.device("cpu")
# Relative root-mean-square error against naive in float64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
NAMES = ("x", "weight", "up", "down")


def random_mask(tokens, experts, density, seed):
    return torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < density


def ragged():
    """Empty experts 1 and 4, one hot expert, tokens 0 to 4 and 50 chose nobody."""
    mask_TE = random_mask(60, 6, 0.3, 0)
    mask_TE[:, 2] = True
    mask_TE[:, [1, 4]] = False
    mask_TE[[0, 1, 2, 3, 4, 50]] = False
    return mask_TE


MASKS = {
    "ragged": ragged(),
    "all-experts": torch.ones(17, 3, dtype=torch.bool),
    "one-expert": torch.ones(33, 1, dtype=torch.bool),
    "one-token": torch.tensor([[False, True, True, False]]),
    "nobody": torch.zeros(9, 4, dtype=torch.bool),
    "no-tokens": torch.zeros(0, 4, dtype=torch.bool),
    "balanced": torch.eye(5, dtype=torch.bool).repeat(40, 1),
}


def make_inputs(mask_TE, width=16, expert_width=24, gated=True, dtype=torch.float64):
    """Leaves x, weight, up, down; values exact in bfloat16, so that every dtype computes the same problem."""
    generator = torch.Generator().manual_seed(1)
    pairs, experts = int(mask_TE.sum()), mask_TE.shape[1]
    rows = expert_width * (2 if gated else 1)
    shapes = ((len(mask_TE), width), (pairs,), (experts, rows, width), (experts, width, expert_width))
    scales = (1, 1, width**-0.5, expert_width**-0.5)
    return [
        (torch.randn(shape, generator=generator) * scale).bfloat16().to(dtype).requires_grad_()
        for shape, scale in zip(shapes, scales, strict=True)
    ]


def evaluate(mask_TE, leaves, backend, activation="swiglu"):
    """Output and the gradients of all leaves."""
    x, weight, up, down = leaves
    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(weight)
    y = compute_experts(x, assignment, up, down, Activation(activation), backend)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, grad_y, allow_unused=True)]


def assert_same(actual, expected, tolerance):
    for name, ours, reference in zip(("y", *NAMES), actual, expected, strict=True):
        assert ours is not None, f"no gradient of {name}"
        assert ours.shape == reference.shape
        error = (ours.double() - reference.double()).norm()
        limit = tolerance * reference.double().norm()
        assert error <= limit, f"{name}: relative RMS {error / reference.double().norm():.2e} > {tolerance}"


def runnable(dtype):
    return [name for name in backends() if why_not(name, CPU, dtype) is None and name != "naive"]


def needs(backend, dtype=torch.float32):
    """Skip where the backend cannot run, loudly."""
    if reason := why_not(backend, CPU, dtype):
        pytest.skip(f"{backend}: {reason}")


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_backends_match_naive(case, dtype):
    mask_TE = MASKS[case]
    expected = evaluate(mask_TE, make_inputs(mask_TE), "naive")
    names = runnable(dtype)
    assert "loop" in names
    assert ("fused" in names) == (why_not("fused", CPU, dtype) is None)
    for name in names:
        assert_same(evaluate(mask_TE, make_inputs(mask_TE, dtype=dtype), name), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu", "silu", "gelu", "relu"])
@pytest.mark.parametrize("backend", ["fused", "loop", "grouped_mm", "transformers:batched_mm"])
def test_activations(activation, backend):
    needs(backend)
    gated = Activation(activation).gated
    mask_TE = MASKS["ragged"]
    expected = evaluate(mask_TE, make_inputs(mask_TE, gated=gated), "naive", activation)
    actual = evaluate(mask_TE, make_inputs(mask_TE, gated=gated, dtype=torch.float32), backend, activation)
    assert_same(actual, expected, TOLERANCE[torch.float32])


def cut_small(monkeypatch):
    """Tiles of 8 rows, so that experts are cut into pieces and share tiles even in tests."""
    monkeypatch.setattr(loop_module, "_tile_rows", lambda *_: 8)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("call_rows", [0, 3, 10**6])
def test_loop_with_cut_experts(dtype, call_rows, monkeypatch):
    cut_small(monkeypatch)
    monkeypatch.setattr(loop_module, "_call_rows", lambda *_: call_rows)
    mask_TE = MASKS["ragged"]
    expected = evaluate(mask_TE, make_inputs(mask_TE), "naive")
    assert_same(evaluate(mask_TE, make_inputs(mask_TE, dtype=dtype), "loop"), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("cut", [False, True])
def test_loop_reads_no_uninitialised_memory(cut, monkeypatch):
    mask_TE = MASKS["ragged"]
    leaves = {dtype: make_inputs(mask_TE, dtype=dtype) for dtype in TOLERANCE}
    expected = evaluate(mask_TE, leaves[torch.float64], "naive")
    if cut:
        cut_small(monkeypatch)
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    calls = []

    def poison(make):
        def made(*args, **kwargs):
            calls.append(make)
            return (
                made_tensor.fill_(torch.nan)
                if (made_tensor := make(*args, **kwargs)).is_floating_point()
                else made_tensor
            )

        return made

    monkeypatch.setattr(torch, "empty", poison(empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(new_empty))
    for dtype, tolerance in TOLERANCE.items():
        assert_same(evaluate(mask_TE, leaves[dtype], "loop"), expected, tolerance)
    assert empty in calls
    assert new_empty in calls


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 40),
    experts=st.integers(1, 7),
    width=st.integers(1, 9),
    expert_width=st.integers(1, 9),
    density=st.floats(0, 1),
    call_rows=st.sampled_from([0, 2, 50]),
    row_multiple=st.sampled_from([1, 4]),
    seed=st.integers(0, 99),
)
def test_loop_on_any_shape(tokens, experts, width, expert_width, density, call_rows, row_multiple, seed):
    mask_TE = random_mask(tokens, experts, density, seed)
    leaves = make_inputs(mask_TE, width, expert_width)
    expected = evaluate(mask_TE, leaves, "naive")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_module, "_call_rows", lambda *_: call_rows)
        patch.setattr(loop_module, "_row_multiple", lambda *_: row_multiple)
        patch.setattr(loop_module, "_tile_rows", lambda *_: 16)
        assert_same(evaluate(mask_TE, leaves, "loop"), expected, TOLERANCE[torch.float64])


def test_loop_gradcheck():
    mask_TE = random_mask(7, 3, 0.6, 3)
    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape))

    def run(x, weight, up, down):
        return compute_experts(x, assignment.with_weights(weight), up, down, Activation("swiglu"), "loop")

    assert gradcheck(run, make_inputs(mask_TE, 3, 2))


@pytest.mark.parametrize("backend", ["fused", "loop"])
@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
def test_each_gradient_alone(backend, wanted):
    needs(backend)
    mask_TE = MASKS["ragged"]
    leaves = make_inputs(mask_TE, dtype=torch.float32)
    expected = evaluate(mask_TE, leaves, "naive")[1 + wanted]
    alone = [leaf.detach().requires_grad_(index == wanted) for index, leaf in enumerate(leaves)]
    x, weight, up, down = alone
    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(weight)
    y = compute_experts(x, assignment, up, down, Activation("swiglu"), backend)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y.dtype))
    torch.testing.assert_close(alone[wanted].grad, expected, rtol=1e-4, atol=1e-5)
    assert all(leaf.grad is None for index, leaf in enumerate(alone) if index != wanted)


def test_loop_double_backward_raises():
    mask_TE = MASKS["ragged"]
    leaves = make_inputs(mask_TE)
    x, weight, up, down = leaves
    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(weight)
    y = compute_experts(x, assignment, up, down, Activation("swiglu"), "loop")
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.sum().backward()


@pytest.mark.parametrize("backend", ["fused", "loop", "grouped_mm", "transformers:grouped_mm"])
def test_strided_inputs(backend):
    needs(backend)
    mask_TE = MASKS["ragged"]
    leaves = make_inputs(mask_TE, dtype=torch.float32)
    expected = evaluate(mask_TE, leaves, "naive")
    strided = [leaf.detach().mT.contiguous().mT.requires_grad_() if leaf.dim() > 1 else leaf for leaf in leaves]
    assert not strided[0].is_contiguous()
    assert_same(evaluate(mask_TE, strided, backend), expected, TOLERANCE[torch.float32])


@pytest.mark.parametrize("backend", ["naive", "fused", "loop", "grouped_mm", "transformers:batched_mm"])
def test_autocast_computes_in_bfloat16_and_returns_the_input_dtype(backend):
    needs(backend, torch.bfloat16)
    mask_TE = MASKS["ragged"]
    leaves = make_inputs(mask_TE, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(mask_TE, leaves, backend)
    assert {tensor.dtype for tensor in actual} == {torch.float32}
    assert_same(actual, evaluate(mask_TE, leaves, "naive"), TOLERANCE[torch.bfloat16])
    assert not torch.equal(actual[0], evaluate(mask_TE, leaves, backend)[0])


@pytest.mark.parametrize("backend", ["fused", "loop", "grouped_mm"])
def test_float32_routing_weights_with_bfloat16_experts(backend):
    needs(backend, torch.bfloat16)
    mask_TE = MASKS["ragged"]
    expected = evaluate(mask_TE, make_inputs(mask_TE), "naive")
    leaves = make_inputs(mask_TE, dtype=torch.bfloat16)
    leaves[1] = leaves[1].detach().float().requires_grad_()
    actual = evaluate(mask_TE, leaves, backend)
    assert actual[0].dtype == torch.bfloat16
    assert actual[2].dtype == torch.float32
    assert_same(actual, expected, TOLERANCE[torch.bfloat16])


def test_auto_is_the_fastest_that_runs_and_names_mean_themselves():
    fused = why_not("fused", CPU, torch.float32) is None
    assert resolve_backend("auto", "cpu", torch.float32) == ("fused" if fused else "loop")
    assert resolve_backend("auto", "cpu", torch.float64) == "loop"
    assert resolve_backend("naive", "cpu", torch.float32) == "naive"


@pytest.mark.parametrize(
    ("name", "device", "dtype", "message"),
    [
        ("fastest", "cpu", torch.float32, "unknown experts backend 'fastest'"),
        ("loop", "cuda", torch.float32, "cuda"),
        ("fused", "cuda", torch.float32, "cuda"),
        ("fused", "cpu", torch.float64, "float64"),
        ("grouped_mm", "cpu", torch.float64, "float64"),
        ("transformers:sonicmoe", "cpu", torch.bfloat16, "CUDA only"),
    ],
)
def test_a_backend_that_cannot_run_says_why(name, device, dtype, message):
    with pytest.raises(UserError, match=message):
        resolve_backend(name, device, dtype)


def test_mismatched_shapes_and_dtypes_are_refused():
    mask_TE = MASKS["ragged"]
    x, weight, up, down = make_inputs(mask_TE, dtype=torch.float32)
    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(weight)
    with pytest.raises(ValueError, match="do not fit"):
        compute_experts(x, assignment, up, down, Activation("silu"))
    with pytest.raises(ValueError, match="60 tokens"):
        compute_experts(x[:3], assignment, up, down, Activation("swiglu"))
    with pytest.raises(ValueError, match="autocast"):
        compute_experts(x.bfloat16(), assignment, up, down, Activation("swiglu"))
    with pytest.raises(ValueError, match="divisible by 4"):
        evaluate(mask_TE, make_inputs(mask_TE, 15, 8, dtype=torch.float32), "grouped_mm")


def test_loop_sums_bfloat16_outputs_in_float32(monkeypatch):
    monkeypatch.setattr(loop_module, "_tile_rows", lambda *_: 64)
    mask_TE = torch.ones(40, 64, dtype=torch.bool)
    leaves = make_inputs(mask_TE)
    expected = evaluate(mask_TE, leaves, "naive")[0].detach()
    low = [leaf.detach().bfloat16() for leaf in leaves]
    assignment = Assignment.from_mask(mask_TE, torch.zeros(mask_TE.shape)).with_weights(low[1])
    y = compute_experts(low[0], assignment, low[2], low[3], Activation("swiglu"), "loop").double()
    # The rounded parts average out over 64 experts; rounding the running sum 64 times would not.
    assert (y - expected).norm() < 6e-3 * expected.norm()
