"""The C++ kernel for few tokens against `naive` in float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crossways.assignment import Assignment
from crossways.experts import Activation, compute_experts, why_not
from crossways.experts import fused_passes as module

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-3}

pytestmark = pytest.mark.skipif(
    why_not("fused", CPU, torch.float32) is not None, reason=str(why_not("fused", CPU, torch.float32))
)


def problem(tokens, experts, width, expert_width, activation, dtype, seed, share=0.5):
    """Values that are exact in bfloat16, and a random choice; it may be empty."""
    generator = torch.Generator().manual_seed(seed)
    rows = expert_width * (2 if Activation(activation).gated else 1)
    shapes = ((tokens, width), (experts, rows, width), (experts, width, expert_width))
    x_TD, up_EHD, down_EDF = (
        (torch.randn(shape, generator=generator) * shape[-1] ** (-0.5 if len(shape) == 3 else 0)).bfloat16().to(dtype)
        for shape in shapes
    )
    mask_TE = torch.rand(tokens, experts, generator=generator) < share
    return x_TD, Assignment.from_mask(mask_TE, torch.rand(tokens, experts, generator=generator)), up_EHD, down_EDF


def by_the_kernel(x_TD, pairs, up_EHD, down_EDF, activation):
    """What the kernel for few tokens makes of it, whether or not another would be chosen."""
    tensors = module._tensors(x_TD, pairs.weight_P, up_EHD, down_EDF, pairs.token_P, pairs.offsets_E1)
    tensors["y"] = torch.full_like(x_TD, torch.nan)
    problem = module._problem(tensors, activation.name)
    module.library().crossways_experts_few(ctypes.byref(problem), int(x_TD.dtype == torch.bfloat16))
    return tensors["y"]


def by_fused(*given):
    return compute_experts(*given, "fused")


def error(given, activation, run=by_fused):
    x_TD, pairs, up_EHD, down_EDF = given
    ours = run(*given, Activation(activation))
    exact = x_TD.double(), pairs.with_weights(pairs.weight_P.double()), up_EHD.double(), down_EDF.double()
    expected = compute_experts(*exact, Activation(activation), "naive")
    assert ours.dtype == x_TD.dtype
    return ((ours.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    experts=st.integers(1, 6),
    width=st.integers(2, 80),
    expert_width=st.integers(2, 80),
    activation=st.sampled_from(["swiglu", "geglu", "reglu", "silu", "gelu", "relu"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 99),
    threads=st.sampled_from([1, 2, 3]),
)
def test_any_shape(tokens, experts, width, expert_width, activation, dtype, seed, threads):
    if why_not("fused", CPU, dtype):
        return
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            given_ = problem(tokens, experts, width, expert_width, activation, dtype, seed)
            if given_[1].num_pairs > 2:  # of one or two pairs all may be differences of nearly equal numbers
                assert error(given_, activation) < 10 * TOLERANCE[dtype]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_step_of_generation_in_odd_widths(dtype):
    if reason := why_not("fused", CPU, dtype):
        pytest.skip(reason)
    with torch.no_grad():
        assert error(problem(3, 16, 576, 48, "swiglu", dtype, 0, share=0.7), "swiglu") < TOLERANCE[dtype]
        assert error(problem(1, 5, 333, 47, "geglu", dtype, 1, share=0.9), "geglu") < TOLERANCE[dtype]


def of_pairs(pairs, tokens, experts, width, expert_width, dtype):
    """The same with chosen (token, expert) pairs."""
    x_TD, _, *weights = problem(tokens, experts, width, expert_width, "swiglu", dtype, 4)
    token_P, expert_P = torch.tensor(pairs).unbind(1)
    weight_P = torch.rand(len(pairs), generator=torch.Generator().manual_seed(5))
    return x_TD, Assignment.from_pairs(token_P, expert_P, weight_P, tokens, experts), *weights


HOSTILE = {
    "a hot expert": [(token, 3) for token in range(29)] + [(token, token % 40) for token in range(29)],
    "the same token again and again": [(2, 1)] * 70 + [(0, 1)] * 3 + [(token % 7, token) for token in range(40)],
    "one expert each": [(token, 7 * token % 40) for token in range(33)],
    **{f"{count} of one expert": [(token, 0) for token in range(count)] for count in (3, 6, 7, 8, 13, 19)},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_hostile_loads(case, dtype):
    if reason := why_not("fused", CPU, dtype):
        pytest.skip(reason)
    given_ = of_pairs(HOSTILE[case], 33, 40, 72, 45, dtype)
    with torch.no_grad():
        assert error(given_, "swiglu") < TOLERANCE[dtype]
        assert error(given_, "swiglu", by_the_kernel) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_memory_left_by_a_broken_call_does_not_leak(dtype):
    """Working memory is kept between calls: what a call of NaN leaves there must not reach the next."""
    if reason := why_not("fused", CPU, dtype):
        pytest.skip(reason)
    with torch.no_grad():
        x_TD, *rest = problem(9, 8, 96, 80, "swiglu", dtype, 0)
        assert compute_experts(torch.full_like(x_TD, torch.nan), *rest, Activation("swiglu"), "fused").isnan().all()
        assert error(problem(7, 8, 90, 70, "swiglu", dtype, 1), "swiglu") < TOLERANCE[dtype]


def test_it_runs_for_few_tokens_only(monkeypatch):
    taken, run = [], module._pass(module.library())
    monkeypatch.setattr(module, "_pass", lambda _: lambda *arguments: taken.append(run(*arguments)) or taken[-1])
    many_tokens = problem(65, 30, 32, 32, "swiglu", torch.float32, 0, share=0.1)
    many_of_an_expert = problem(64, 3, 32, 32, "swiglu", torch.float32, 0)
    few_tokens = problem(4, 3, 32, 32, "swiglu", torch.float32, 0)
    for given_ in (many_tokens, many_of_an_expert, few_tokens):
        compute_experts(*given_, Activation("swiglu"), "fused")
    assert taken == [2, 2, 1]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_that_are_wanted_change_no_bit(dtype):
    """As checkpointing assumes, which goes through a layer once without and once with them."""
    for tokens in (3, 25, 70):
        given_ = problem(tokens, 7, 100, 83, "swiglu", dtype, 3)
        plain = compute_experts(*given_, Activation("swiglu"), "fused")
        given_[0].requires_grad_()
        assert torch.equal(compute_experts(*given_, Activation("swiglu"), "fused").detach(), plain)


def test_nobody_is_chosen():
    given_ = problem(4, 3, 32, 32, "swiglu", torch.float32, 0, share=-1.0)
    assert given_[1].num_pairs == 0
    assert not compute_experts(*given_, Activation("swiglu"), "fused").any()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", [0.05, 0.5], ids=["one token each", "many"])
def test_the_number_of_threads_changes_no_bit(share, dtype):
    if reason := why_not("fused", CPU, dtype):
        pytest.skip(reason)
    given_ = problem(25, 7, 100, 83, "swiglu", dtype, 3, share)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(compute_experts(*given_, Activation("swiglu"), "fused"))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_dtype_are_as_good_as_in_float32(dtype):
    x_TD, pairs, *matrices = problem(25, 7, 100, 83, "swiglu", torch.float32, 3)
    narrow, wide = (pairs.with_weights(pairs.weight_P.to(dtype).to(to)) for to in (dtype, torch.float32))
    expected = compute_experts(x_TD, wide, *matrices, Activation("swiglu"), "fused")
    assert torch.equal(compute_experts(x_TD, narrow, *matrices, Activation("swiglu"), "fused"), expected)


def test_any_strides_and_narrow_indices():
    x_TD, pairs, up_EHD, down_EDF = problem(25, 7, 100, 83, "swiglu", torch.float32, 3)
    expected = compute_experts(x_TD, pairs, up_EHD, down_EDF, Activation("swiglu"), "fused")
    narrow = Assignment(pairs.token_P.int(), pairs.expert_P, pairs.weight_P, pairs.offsets_E1.int(), 25)
    turned = x_TD.t().contiguous().t(), narrow, up_EHD.mT.contiguous().mT, down_EDF.mT.contiguous().mT
    assert torch.equal(compute_experts(*turned, Activation("swiglu"), "fused"), expected)


@pytest.mark.parametrize("tokens", [3, 64])
def test_a_broken_weight_spoils_its_own_feature_only(tokens):
    """In bfloat16 widths are filled up to what the matrix unit reads at once."""
    if reason := why_not("fused", CPU, torch.bfloat16):
        pytest.skip(reason)
    x_TD, pairs, up_EHD, down_EDF = problem(tokens, 3, 70, 45, "swiglu", torch.bfloat16, 0)
    down_EDF[1, 20, 44] = up_EHD[2, 44, 69] = torch.nan
    y_TD = compute_experts(x_TD, pairs, up_EHD, down_EDF, Activation("swiglu"), "fused")
    expected = compute_experts(x_TD, pairs, up_EHD, down_EDF, Activation("swiglu"), "naive")
    assert 0 < expected.isnan().sum() < expected.numel()
    assert torch.equal(y_TD.isnan(), expected.isnan())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_broken_token_stays_alone(dtype):
    if reason := why_not("fused", CPU, dtype):
        pytest.skip(reason)
    x_TD, pairs, *weights = problem(6, 4, 32, 32, "swiglu", dtype, 2, share=0.9)
    x_TD[2] = torch.nan
    y_TD = compute_experts(x_TD, pairs, *weights, Activation("swiglu"), "fused")
    assert y_TD[2].isnan().all()
    assert y_TD[[0, 1, 3, 4, 5]].isfinite().all()
