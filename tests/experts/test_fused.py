"""The C++ kernel against `naive`: shapes that do not divide, loads that do not balance, tokens that are broken."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from crossways.assignment import Assignment
from crossways.experts import Activation, Experts, compute_experts, why_not
from crossways.experts.fused import backward, forward
from crossways.gates.linear import LinearGate
from crossways.layers import MoE
from crossways.router import Router
from crossways.rules.score import Softmax
from crossways.rules.select import Capacity, TopC, TopK

# Relative root-mean-square error against naive in float64.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    why_not("fused", CPU, torch.float32) is not None, reason=str(why_not("fused", CPU, torch.float32))
)


def make(index_TK, experts, width, expert_width, rows, dtype, seed=0):
    """Leaves x, weight, up, down whose values are exact in bfloat16; index_TK < 0 is no pair."""
    generator = torch.Generator().manual_seed(seed)
    token_P, slot_P = (index_TK >= 0).nonzero(as_tuple=True)
    shapes = ((len(index_TK), width), (len(token_P),), (experts, rows, width), (experts, width, expert_width))
    leaves = [
        (torch.randn(shape, generator=generator) * shape[-1] ** (-0.5 if len(shape) == 3 else 0)).bfloat16().to(dtype)
        for shape in shapes
    ]
    chosen = Assignment.from_pairs(
        token_P, index_TK[token_P, slot_P], torch.zeros(len(token_P)), len(index_TK), experts
    )
    return chosen, [leaf.requires_grad_() for leaf in leaves]


def evaluate(chosen, leaves, backend, activation="swiglu"):
    x, weight, up, down = leaves
    y = compute_experts(x, chosen.with_weights(weight), up, down, Activation(activation), backend)
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(9)).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def assert_as_naive(index_TK, experts, width, expert_width, dtype, activation="swiglu"):
    rows = expert_width * (2 if Activation(activation).gated else 1)
    chosen, exact = make(index_TK, experts, width, expert_width, rows, torch.float64)
    _, leaves = make(index_TK, experts, width, expert_width, rows, dtype)
    expected = evaluate(chosen, exact, "naive", activation)
    plain = evaluate(chosen, leaves, "naive", activation)
    actual = evaluate(chosen, leaves, "fused", activation)
    names = ("y", "x", "weight", "up", "down")
    for name, ours, readable, reference in zip(names, actual, plain, expected, strict=True):
        assert ours.dtype == dtype
        scale = reference.norm().clamp_min(1e-30)
        error, unavoidable = ((x.double() - reference).norm() / scale for x in (ours, readable))
        # Of a few numbers all may be differences of nearly equal ones; then `naive` is as far off in this dtype.
        assert error <= max(TOLERANCE[dtype], 4 * unavoidable), f"{name}: relative RMS {error:.1e}"


def hot(tokens, experts, k):
    """Nine tokens in ten choose expert 1 first."""
    index_TK = torch.rand(tokens, experts).topk(k).indices
    mostly_T = torch.rand(tokens) < 0.9
    rest_TK = 2 + torch.rand(tokens, experts - 2).topk(k).indices
    rest_TK[:, 0] = 1
    return torch.where(mostly_T[:, None], rest_TK, index_TK)


CASES = {
    "odd-sizes": lambda: (torch.rand(61, 7).topk(2).indices, 7, 37, 45),
    "hot-expert": lambda: (hot(700, 6, 2), 6, 64, 32),
    "256-experts-8": lambda: (torch.rand(150, 256).topk(8).indices, 256, 32, 32),
    "one-expert-each": lambda: (torch.rand(130, 8).topk(1).indices, 8, 48, 64),
    "empty-experts": lambda: (torch.rand(50, 3).topk(2).indices * 4, 12, 32, 40),
    "some-choose-nobody": lambda: (
        torch.where(torch.rand(90, 3) < 0.4, -1, torch.rand(90, 5).topk(3).indices),
        5,
        33,
        31,
    ),
    "one-token": lambda: (torch.tensor([[3, 0]]), 4, 96, 64),
    "eight-tokens-one-expert": lambda: (torch.zeros(8, 1, dtype=torch.int64), 1, 64, 96),
    "many-groups": lambda: (torch.rand(1200, 2).topk(2).indices, 2, 32, 64),
    "deep": lambda: (torch.rand(40, 4).topk(2).indices, 4, 1056, 544),
    "deep-and-odd": lambda: (torch.rand(40, 4).topk(2).indices, 4, 333, 150),
    "deep-either-side-of-few": lambda: (torch.tensor([0] * 96 + [1] * 97 + [2] * 125)[:, None], 3, 1056, 330),
    "wide-one-group": lambda: (torch.zeros(460, 1, dtype=torch.int64), 1, 330, 150),
    "wide-many-groups": lambda: (hot(700, 6, 2), 6, 330, 150),
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def needs(dtype):
    if reason := why_not("fused", CPU, dtype):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_hostile_shapes(case, dtype, threads):
    needs(dtype)
    assert_as_naive(*CASES[case](), dtype)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 90),
    experts=st.integers(1, 6),
    width=st.integers(2, 80),
    expert_width=st.integers(2, 80),
    activation=st.sampled_from(["swiglu", "geglu", "reglu", "silu", "gelu", "relu"]),
    seed=st.integers(0, 99),
)
def test_any_shape_in_float32(tokens, experts, width, expert_width, activation, seed):
    torch.manual_seed(seed)
    k = 1 + seed % experts
    index_TK = torch.where(torch.rand(tokens, k) < 0.2, -1, torch.rand(tokens, experts).topk(k).indices)
    if (index_TK >= 0).any():
        assert_as_naive(index_TK, experts, width, expert_width, torch.float32, activation)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_broken_weight_spoils_its_own_feature_only(dtype):
    """Rows of odd width end in the middle of what is read at once; what follows belongs to another row or expert."""
    needs(dtype)
    chosen, (x, weight, up, down) = make(torch.rand(50, 3).topk(2).indices, 3, 70, 45, 90, dtype)
    down.data[1, 20, 0] = up.data[2, 0, 0] = float("nan")
    y = compute_experts(x, chosen.with_weights(weight), up, down, Activation("swiglu"), "fused")
    expected = compute_experts(x, chosen.with_weights(weight), up, down, Activation("swiglu"), "naive")
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("broken", [0, 17])
@pytest.mark.parametrize("backend", ["naive", "fused", "loop"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_broken_token_stays_alone(backend, dtype, broken):
    """Its own output and gradients are NaN; other tokens' outputs, and experts that it did not choose, are as if it
    were not there. Padding repeats an expert's first token in `loop`, hence token 0, and idle experts before its."""
    needs(dtype)
    index_TK = torch.tensor([1, 2, 4, 5, 6, 7])[torch.rand(40, 6).topk(2).indices]
    index_TK[0] = torch.tensor([1, 4])
    chosen, leaves = make(index_TK, 8, 32, 32, 64, dtype)
    with torch.no_grad():
        leaves[0][broken] = torch.nan
    y, grad_x, _, grad_up, grad_down = evaluate(chosen, leaves, backend)
    others_T = torch.arange(40) != broken
    assert y[broken].isnan().all()
    assert y[others_T].isfinite().all()
    assert grad_x[others_T].isfinite().all()
    for expert in range(8):
        if expert in index_TK[broken]:
            assert grad_up[expert].isnan().any()
        else:
            assert grad_up[expert].isfinite().all()
            assert grad_down[expert].isfinite().all()
    assert not grad_up[[0, 3]].any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_memory_left_by_a_broken_call_does_not_leak(dtype):
    """Working memory is kept between calls; what a call of NaN leaves there must not reach the next."""
    needs(dtype)
    chosen, leaves = make(torch.zeros(64, 1, dtype=torch.int64), 1, 64, 64, 128, dtype)
    with torch.no_grad():
        leaves[0].fill_(torch.nan)
    assert evaluate(chosen, leaves, "fused")[0].isnan().all()
    assert_as_naive(torch.zeros(21, 1, dtype=torch.int64), 1, 64, 64, dtype)
    assert_as_naive(torch.zeros(5, 1, dtype=torch.int64), 1, 50, 40, dtype)


def test_the_same_twice_is_the_same_bit_for_bit():
    chosen, leaves = make(torch.rand(300, 8).topk(3).indices, 8, 64, 64, 128, torch.float32)
    for first, second in zip(evaluate(chosen, leaves, "fused"), evaluate(chosen, leaves, "fused"), strict=True):
        assert torch.equal(first, second)


def test_backward_twice_gives_the_same_gradients():
    chosen, leaves = make(torch.rand(50, 4).topk(2).indices, 4, 32, 32, 64, torch.float32)
    x, weight, up, down = leaves
    y = compute_experts(x, chosen.with_weights(weight), up, down, Activation("swiglu"), "fused")
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    second = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_double_backward_raises():
    chosen, leaves = make(torch.rand(20, 4).topk(2).indices, 4, 32, 32, 64, torch.float32)
    x, weight, up, down = leaves
    y = compute_experts(x, chosen.with_weights(weight), up, down, Activation("swiglu"), "fused")
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r"does not require grad|no autograd|not differentiable|once_differentiable"
    ):
        grad_x.sum().backward()


def test_tokens_out_of_range_are_refused():
    chosen, leaves = make(torch.rand(20, 4).topk(2).indices, 4, 32, 32, 64, torch.float32)
    wrong = Assignment(chosen.token_P + 10, chosen.expert_P, chosen.weight_P, chosen.offsets_E1, 20)
    with pytest.raises(ValueError, match="token"):
        evaluate(wrong, leaves, "fused")


def test_operators_tell_torch_the_truth():
    """Shapes and dtypes that `torch.compile` assumes are those that the kernels give."""
    chosen, leaves = make(torch.rand(50, 4).topk(2).indices, 4, 32, 32, 64, torch.float32)
    arguments = (*leaves, chosen.token_P, chosen.offsets_E1, "swiglu", True)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(forward, arguments, test_utils=tests)
    y, kept = forward(*(leaf.detach() for leaf in leaves), *arguments[4:])
    inputs = (torch.ones_like(y), *(leaf.detach() for leaf in leaves), *arguments[4:6], kept)
    torch.library.opcheck(backward, (*inputs, "swiglu", [True, False, True, True]), test_utils=tests[:2])


@pytest.mark.parametrize("select", [TopK(2), TopC(1.5), Capacity(k=2, factor=1.0)], ids=str)
def test_a_layer_compiles_without_graph_break(select):
    def step(compiled):
        torch.manual_seed(0)
        model = MoE(Router(4, Softmax(), select, gate=LinearGate(32, 4)), Experts(4, 32, 64))
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        x_BSD = torch.randn(2, 40, 32)
        torch._dynamo.reset()
        run = (
            torch.compile(lambda x: model(x)[0], fullgraph=True, backend="aot_eager")
            if compiled
            else lambda x: model(x)[0]
        )
        y_BSD = run(x_BSD)
        y_BSD.square().sum().backward()
        return [y_BSD.detach(), *(parameter.grad for parameter in model.parameters())]

    for ours, theirs in zip(step(True), step(False), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("load", [257, 300, 511, 513, 700])
def test_experts_of_several_groups(load, dtype):
    """So wide that an expert's pairs do not fit the cache at once; the widths let gradients go straight to memory."""
    assert_as_naive(torch.zeros(load, 1, dtype=torch.int64), 1, 1024, 64, dtype)


@pytest.mark.parametrize("load", range(1, 50))
def test_every_number_of_pairs_beside_whole_vectors(load):
    """Float32 has its own ways for columns that fill no vector, and for pairs that fill no block of rows."""
    index_TK = torch.zeros(80, 1, dtype=torch.int64)
    index_TK[load:] = 1
    assert_as_naive(index_TK, 2, 96, 48, torch.float32)
