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
from crossways.native import loading, routing, why_not_native
from crossways.native.loading import NativeUnavailableError, build, library
from crossways.rules.select import Capacity, ExpertChoice, GroupLimited, TopC, TopK, TopP
from crossways.rules.select.base import place_in_queue, top_k_index, top_of_groups

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
    monkeypatch.setattr(routing, "fits", lambda *_: False)
    monkeypatch.setattr(routing, "ready", lambda *_: False)
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
        GroupLimited(k=3, n_group=4, topk_group=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("masked", [False, True])
def test_rules_choose_the_same(monkeypatch, rule, masked):
    scores_BSE = torch.randn(3, 40, 16).softmax(-1)
    allowed_BSE = torch.rand(3, 40, 16) < 0.7 if masked else None
    native, plain = both(monkeypatch, lambda: rule(scores_BSE, scores_BSE, allowed_BSE))
    assert torch.equal(native.to_dense(), plain.to_dense())
    cutoffs = both(monkeypatch, lambda: rule.cutoff(scores_BSE, allowed_BSE))
    assert cutoffs[0] is None or torch.equal(*cutoffs)
