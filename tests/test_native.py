"""Building the C++ parts; and what they do for routing against the plain PyTorch path."""

import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from crossways.assignment import Assignment
from crossways.experts import why_not
from crossways.native import bits, budgeted, loading, routing, why_not_native
from crossways.native.loading import NativeUnavailableError, build, library
from crossways.rules.select import (
    Base,
    Capacity,
    ExpertChoice,
    GroupLimited,
    Positive,
    Sinkhorn,
    Threshold,
    TopC,
    TopK,
    TopP,
)
from crossways.rules.select.base import place_in_queue, top_k_index, top_of_columns, top_of_groups
from crossways.rules.select.base_layer import balanced_assignment, balanced_experts

needs_native = pytest.mark.skipif(why_not_native() is not None, reason=str(why_not_native()))


@needs_native
def test_processes_that_build_at_once_get_one_library(tmp_path):
    before = time.perf_counter()
    with ProcessPoolExecutor(3) as pool:
        paths = set(pool.map(build, [tmp_path] * 3))
    assert time.perf_counter() - before < 120
    assert len(paths) == 1
    assert [path.suffix for path in sorted(tmp_path.iterdir())] == [".lock", ".so"]
    target = paths.pop()
    written = target.stat().st_mtime_ns
    assert build(tmp_path) == target
    assert target.stat().st_mtime_ns == written


def test_without_a_compiler_it_says_so(tmp_path):
    with pytest.raises(NativeUnavailableError, match="no-such-compiler"):
        build(tmp_path, ("no-such-compiler",))
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("true") is None, reason="no `true` here")
def test_a_compiler_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_NEEDED", ())
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho cannot >&2\nexit 1\n')
    broken.chmod(0o755)
    with pytest.raises(NativeUnavailableError, match="cannot"):
        build(tmp_path / "cache", (str(broken),))
    assert not list((tmp_path / "cache").glob("*.so"))


def test_without_the_library_everything_still_works(monkeypatch):
    monkeypatch.setattr(loading, "_load", lambda: "no compiler")
    with pytest.raises(NativeUnavailableError, match="no compiler"):
        library()
    assert "no compiler" in why_not("fused", torch.device("cpu"), torch.float32)
    assert not routing.fits(torch.zeros(10000))


def test_importing_builds_nothing():
    code = "import crossways.experts, crossways.router; from crossways.native.loading import _load; "
    code += "assert _load.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def both(monkeypatch, run):
    """What `run` gives with the C++ parts, and without."""
    monkeypatch.setattr(routing, "_SMALL", 0)
    native = run()
    for name in ("fits", "ready", "solves"):
        monkeypatch.setattr(routing, name, lambda *_: False)
    return native, run()


@needs_native
@pytest.mark.parametrize("experts", [1, 5, 64])
@pytest.mark.parametrize("pairs", [0, 1, 4000])
def test_counting_sort(monkeypatch, experts, pairs):
    expert_P = torch.randint(experts, (pairs,))
    arguments = (torch.arange(pairs), expert_P, torch.rand(pairs), max(pairs, 1), experts)
    native, plain = both(monkeypatch, lambda: Assignment.from_pairs(*arguments))
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1"):
        assert torch.equal(getattr(native, name), getattr(plain, name))


@needs_native
def test_an_expert_out_of_range_is_refused(monkeypatch):
    monkeypatch.setattr(routing, "_SMALL", 0)
    with pytest.raises(ValueError, match=r"\[0, 3\), got 0 to 3"):
        Assignment.from_pairs(torch.arange(4), torch.arange(4), torch.ones(4), 4, 3)


@needs_native
@pytest.mark.parametrize("shape", [(1, 1), (40, 3), (77, 64), (30, 13)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_pairs_of_a_mask(monkeypatch, shape, density):
    mask_TE, weight_TE = torch.rand(shape) < density, torch.rand(shape)
    native, plain = both(monkeypatch, lambda: Assignment.from_mask(mask_TE, weight_TE))
    for name in ("token_P", "expert_P", "weight_P", "offsets_E1"):
        assert torch.equal(getattr(native, name), getattr(plain, name))


def entries(rows, count, kind):
    x = torch.randn(rows, count)
    if kind == "ties":
        x = x.round()
    if kind == "broken":
        x[torch.rand(rows, count) < 0.2] = torch.nan
        x[0, 0] = -torch.tensor(torch.nan)
        x[torch.rand(rows, count) < 0.2] = -torch.inf
    return x


@needs_native
@pytest.mark.parametrize("kind", ["plain", "ties", "broken"])
@pytest.mark.parametrize("count", [1, 16, 33, 200])
def test_top_k_takes_the_greatest_earlier_ones_first(monkeypatch, kind, count):
    x_TE = entries(50, count, kind)
    k = min(8, count)
    native, _ = both(monkeypatch, lambda: top_k_index(x_TE, k))
    ranked = torch.sort(x_TE.nan_to_num(torch.inf, posinf=torch.inf, neginf=-torch.inf), descending=True, stable=True)
    assert torch.equal(native, ranked.indices[:, :k])


@needs_native
@pytest.mark.parametrize("kind", ["plain", "ties", "broken"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("count", [1, 100, 40000])
def test_top_of_groups_takes_as_many_and_none_smaller(monkeypatch, kind, masked, count):
    x_GN = entries(7, count, kind)
    if masked:
        x_GN = x_GN.clamp_min(-1e30)  # an allowed entry is above minus infinity
    allowed_GN = torch.rand(7, count) < 0.6 if masked else None
    budget_G = torch.tensor([0, 1, count // 3, count // 2, count, count + 5, 2])
    native, plain = both(monkeypatch, lambda: top_of_groups(x_GN, allowed_GN, budget_G, count + 5))
    assert torch.equal(native.sum(-1), plain.sum(-1))
    value_GN = x_GN.nan_to_num(1e30, neginf=-1e31)
    for mask_GN in (native, plain):
        assert allowed_GN is None or not (mask_GN & ~allowed_GN).any()
    taken = [value_GN.masked_fill(~mask_GN, -1e38).sort(-1).values for mask_GN in (native, plain)]
    assert torch.equal(*taken)


@needs_native
def test_places_in_queues(monkeypatch):
    queue_Q = torch.randint(9, (500,))
    native, plain = both(monkeypatch, lambda: place_in_queue(queue_Q, 9))
    assert torch.equal(native, plain)
    assert native.tolist() == [int((queue_Q[:i] == queue_Q[i]).sum()) for i in range(500)]


@needs_native
@pytest.mark.parametrize(
    "rule",
    [
        TopK(k=3),
        TopC(k=1.5),
        TopC(k=2, group="batch"),
        TopC(k=2, group="position"),
        ExpertChoice(k=2),
        TopP(p=0.5, cap=4),
        Capacity(k=2, normalize=True),
        Capacity(k=2, order="score", factor=0.7),
        Capacity(k=3, order="token", factor=0.6, group="batch"),
        GroupLimited(k=3, n_group=4, topk_group=2),
        GroupLimited(k=2, n_group=4, topk_group=1, group_score="max"),
        Positive(),
        Threshold(value=0.1),
        Sinkhorn(k=2),
        Base(),
        Base(group="batch"),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_rules_choose_the_same(monkeypatch, rule, masked):
    torch.manual_seed(0)
    scores_BSE = torch.randn(3, 40, 16).softmax(-1)
    scores_BSE[0, 3, 5] = torch.nan
    allowed_BSE = torch.rand(3, 40, 16) < 0.7 if masked else None

    def run():
        leaf_BSE = scores_BSE.clone().requires_grad_()
        made = rule(scores_BSE, leaf_BSE, allowed_BSE)
        (grad_BSE,) = torch.autograd.grad(made.weight_P.square().sum(), leaf_BSE)
        return made.token_P, made.expert_P, made.weight_P.detach(), made.offsets_E1, grad_BSE

    native, plain = both(monkeypatch, run)
    for ours, theirs in zip(native, plain, strict=True):
        assert torch.equal(ours.nan_to_num(-1), theirs.nan_to_num(-1))


@needs_native
@pytest.mark.parametrize("rule", [TopC(k=1.5), ExpertChoice(k=2)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_cutoffs_are_the_same(monkeypatch, rule, masked):
    scores_BSE = torch.randn(3, 40, 16).softmax(-1)
    allowed_BSE = torch.rand(3, 40, 16) < 0.7 if masked else None
    cutoffs = both(monkeypatch, lambda: rule.cutoff(scores_BSE, allowed_BSE))
    assert torch.equal(*cutoffs)


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("budget", [0, 1, 17000, 39999, 40000, 50000])
@pytest.mark.parametrize("masked", [False, True])
def test_one_long_row_by_several_threads(monkeypatch, threads, budget, masked):
    torch.manual_seed(0)
    x_GN = entries(1, 40000, "ties").clamp_min(-2)
    allowed_GN = torch.rand(1, 40000) < 0.6 if masked else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        native, plain = both(monkeypatch, lambda: top_of_groups(x_GN, allowed_GN, torch.tensor([budget]), 40000))
        least = budgeted.least_of_shared(x_GN.view(400, 100), budgeted.Groups(1, 400, 0, 1), budget)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(native, plain)
    expected = x_GN.sort(descending=True).values[0, min(budget, 40000) - 1] if budget else torch.tensor(torch.nan)
    assert torch.equal(least.nan_to_num(-9), expected[None].nan_to_num(-9))


@needs_native
@pytest.mark.parametrize("kind", ["plain", "ties"])
@pytest.mark.parametrize("shape", [(2, 70, 16), (3, 31, 5), (1, 300, 33)])
@pytest.mark.parametrize("masked", [False, True])
def test_columns_are_rows_turned(monkeypatch, kind, shape, masked):
    torch.manual_seed(0)
    groups, count, experts = shape
    x_GNE = entries(groups * count, experts, kind).view(shape)
    allowed_GNE = torch.rand(shape) < 0.6 if masked else None
    budget_GE = torch.randint(-1, count + 3, (groups, experts))
    native, plain = both(monkeypatch, lambda: top_of_columns(x_GNE, allowed_GNE, budget_GE, count))
    assert torch.equal(native, plain)


@needs_native
def test_weights_of_pairs_are_indexing_with_all_its_derivatives(monkeypatch):
    monkeypatch.setattr(routing, "_SMALL", 0)
    mask_TE = torch.rand(9, 5) < 0.5
    token_P, expert_P, *_ = bits.pairs(bits.of_mask(mask_TE), mask_TE)
    matrix_TE = torch.rand(9, 5, requires_grad=True)
    results = []
    for taken_P in (routing.weights(matrix_TE, token_P, expert_P), matrix_TE[token_P, expert_P]):
        (first,) = torch.autograd.grad(taken_P.pow(3).sum(), matrix_TE, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), matrix_TE)
        results.append((taken_P, first, second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_native
@pytest.mark.parametrize("skew", [0.0, 5.0])
@pytest.mark.parametrize(("tokens", "experts"), [(200, 8), (131, 16), (64, 64), (300, 1), (5, 9)])
def test_base_finds_the_optimum_of_scipy(monkeypatch, tokens, experts, skew):
    torch.manual_seed(tokens)
    gain_NE = torch.randn(tokens, experts).double() + skew * torch.rand(experts)
    monkeypatch.setattr(routing, "_SMALL", 0)
    assert routing.solves(gain_NE)  # or both would be scipy's
    native, plain = both(monkeypatch, lambda: balanced_assignment(gain_NE))
    assert native.sum(0).max() <= -(-tokens // experts)
    assert native.sum(1).tolist() == [1] * tokens
    assert gain_NE[native].sum().item() == pytest.approx(gain_NE[plain].sum().item(), rel=1e-12)


@needs_native
@pytest.mark.parametrize("far", [0.0, 1e6])
@pytest.mark.parametrize(("tokens", "experts"), [(200, 8), (131, 16), (70, 5)])
def test_base_sees_gains_that_floats_cannot_tell_apart(monkeypatch, tokens, experts, far):
    torch.manual_seed(tokens)
    monkeypatch.setattr(routing, "_SMALL", 0)
    fine_NE = 2.0**-36 * torch.randint(0, 1000, (tokens, experts)).double()  # below a float's steps
    gain_NE = torch.randint(0, 3, (tokens, experts)).double() + fine_NE
    gain_NE[:, 0] += far
    native, plain = both(monkeypatch, lambda: balanced_assignment(gain_NE))
    ours, theirs = ((gain_NE - far * (torch.arange(experts) == 0))[chosen].sum() for chosen in (native, plain))
    assert native.sum(0).max() <= -(-tokens // experts)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12 if not far else 1e-9)


@needs_native
def test_groups_of_base_are_solved_apart(monkeypatch):
    gain_NE = torch.randn(90, 4).double()
    monkeypatch.setattr(routing, "_SMALL", 0)
    together = balanced_experts(gain_NE, torch.tensor([0, 30, 30, 90]))
    apart = [balanced_experts(gain_NE[a:b], torch.tensor([0, b - a])) for a, b in ((0, 30), (30, 90))]
    assert torch.equal(together, torch.cat(apart))
