"""Rows of expert compute: with many tokens beside a dense network of the same active size, with few beside the rate
at which the machine reads memory, and how cost grows with the number of tokens.

Every contender is first compared with `naive`, in the passes and on the inputs that are then timed, every element
of the output and of the gradients; who is wrong is not timed. Then all run in turn, again and again; each time is
divided by the dense network's of the same round. Making the assignment from top-k indices is part of every time, as
sorting is in transformers' functions. The checked pass is the warm-up.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from contenders import DENSE, OURS, PEERS
from crossways.experts import resolve_backend
from field import Field, right
from measure import Times, clock_of, in_turn, keep_pages, peak_bandwidth, peak_flops, ratio
from problems import Case, Contender, Problem, build
from table import Job, Row

PASSES = ("forward", "forward+backward")
SLOW = 5.0
"""Who takes more than so many times the dense network's time, and long, is not run again."""
FLUSH = 2**28
"""Bytes to read for everything in the caches to be replaced."""
READING = 0.4
"""Seconds for which the rate of reading is measured beside a row."""


@dataclass
class Machine:
    """What the machine can do at best, measured when first asked for."""

    device: str
    flops: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0

    def flops_in(self, dtype: str) -> float:
        """FLOP/s of matrix products."""
        if dtype not in self.flops:
            self.flops[dtype] = peak_flops(getattr(torch, dtype), self.device)
        return self.flops[dtype]

    def bytes_per_second(self) -> float:
        """Of reading memory."""
        self.bandwidth = self.bandwidth or peak_bandwidth(self.device)
        return self.bandwidth

    def reading_now(self) -> float:
        """The same at this moment. It drifts by tens of per cent within a run, and the best of the run is kept."""
        rate = peak_bandwidth(self.device, seconds=READING)
        self.bandwidth = max(self.bandwidth, rate)
        return rate

    def floor(self, problem: Problem, backward: bool) -> tuple[float, str]:
        """Seconds that one pass takes at least, and whether products or memory take them."""
        case, itemsize = problem.case, problem.dtype.itemsize
        products = case.flops(backward) / self.flops_in(str(problem.dtype).removeprefix("torch."))
        memory = case.least_bytes(problem.touched, itemsize, backward) / self.bytes_per_second()
        return max((products, "products"), (memory, "memory"))

    def row(self, dtypes: Sequence[str]) -> list[Row]:
        """The peaks as rows of the table."""
        rows = [
            Row("peak", "matrix product", name, {"bound": f"{self.flops_in(name) / 1e9:.0f} GFLOP/s"})
            for name in dtypes
        ]
        return [*rows, Row("peak", "reading", "bytes", {"bound": f"{self.bytes_per_second() / 1e9:.1f} GB/s"})]


def everybody(device: str) -> tuple[str, ...]:
    """Names of all contenders but the dense network."""
    return (*OURS[device], *PEERS[device])


def timed(
    problem: Problem, field: Field, seconds: float, backward: bool, after: Callable[[], object] = lambda: None
) -> Times:
    """Seconds of each contender, round by round. The dense network, ours and the fastest peer go on to the end.

    The checked pass was a warm-up; where passes are cheap there is one more, as some compile in their first. On CUDA
    devices nearly everybody compiles or times block shapes in it, so it says nothing of who is slow.
    """
    device, first = problem.device, field.first[backward]
    warm = device == "cuda" or sum(first.values()) < seconds / 2
    known = None if device == "cuda" else first
    mine = resolve_backend("auto", device, problem.dtype)

    def one(contender: Contender) -> Callable[[], None]:
        return lambda: problem.step(contender, backward)

    runs = {name: one(contender) for name, contender in field.taking_part.items() if name in first}
    return in_turn(
        runs, seconds, warm=int(warm), slow=SLOW, clock=clock_of(device), after=after, known=known,
        wanted=lambda times: {DENSE, mine, fastest_peer(times, device)},
    )  # fmt: skip


def against_dense(
    case: Case, dtype: str, device: str, seconds: float, machine: Machine, called: str = ""
) -> list[Row]:
    """Two rows, forward and forward+backward: time / dense of everybody."""
    problem = build(case, getattr(torch, dtype), device)
    field = right(problem, everybody(device))
    mine = resolve_backend("auto", device, problem.dtype)
    rows = []
    for backward, what in enumerate(PASSES):
        times = timed(problem, field, seconds, bool(backward))
        dense = statistics.median(times[DENSE])
        share = case.flops(bool(backward)) / dense / machine.flops_in(dtype)
        bound = f"{1e3 * dense:.1f} ms, {share:.2f} of peak"
        if device == "cuda":
            bound += f", {peak_memory(problem, field.taking_part[DENSE]):.2f} GB"
        least, by = machine.floor(problem, bool(backward))
        cells = {"bound": bound, "floor": f"{least / dense:.2f} {by}"}
        cells |= {"error": worst(field, mine), "best peer / ours": best_peer(times, mine, device)}
        for name in times.keys() - {DENSE}:
            cells[name] = ratio(times[name], times[DENSE])
            if device == "cuda" and backward:
                cells[name] += f", {peak_memory(problem, field.taking_part[name]):.2f} GB"
        rows.append(Row(what + called, str(case), dtype, cells, field.left_out))
    return rows


def with_kept_pages(case: Case, dtype: str, device: str, seconds: float, machine: Machine) -> list[Row]:
    """The same two rows after `keep_pages`, which holds for all that this process does later."""
    if not keep_pages():
        cells, notes = {"bound": "-"}, {"pages kept": "the C library has no setting for it"}
        return [Row("forward, pages kept", str(case), dtype, cells, notes)]
    return against_dense(case, dtype, device, seconds, machine, called=", pages kept")


def worst(field: Field, mine: str) -> str:
    """The greatest error of ours."""
    return f"{field.errors[mine]:.0e}" if mine in field.errors else "-"


def fastest_peer(times: Times, device: str) -> str | None:
    """By the median."""
    peers = [name for name in PEERS[device] if name in times]
    return min(peers, key=lambda name: statistics.median(times[name]), default=None)


def best_peer(times: Times, mine: str, device: str) -> str:
    """How many times faster ours is than the fastest peer; a dash without peers."""
    fastest = fastest_peer(times, device)
    return "-" if fastest is None or mine not in times else ratio(times[fastest], times[mine])


def peak_memory(problem: Problem, contender: Contender) -> float:
    """GB that forward and backward take beyond what is there before, on a CUDA device."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.step(contender, backward=True)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def few_tokens(case: Case, dtype: str, device: str, seconds: float, machine: Machine) -> list[Row]:
    """Two rows, forward: bytes of the touched experts' matrices per second over the rate of reading right before or
    right after, whichever is higher. In the first contenders follow each other as they are, in the second everything
    in the caches is replaced between them."""
    problem = build(case, getattr(torch, dtype), device)
    field = right(problem, everybody(device), passes=(False,))
    mine = resolve_backend("auto", device, problem.dtype)
    one = case.expert_bytes(problem.dtype.itemsize)
    other = torch.ones(FLUSH // 4, device=device)
    rate = machine.reading_now()
    rows = []
    for what, after in (("few tokens", lambda: None), ("few tokens, cold", other.sum)):
        times = timed(problem, field, seconds / 2, False, after)
        rate, before = machine.reading_now(), rate
        full = problem.touched * one / max(before, rate)
        cells = {name: ratio([full] * len(spent), spent) for name, spent in times.items() if name != DENSE}
        dense = ratio([full * case.k / problem.touched] * len(times[DENSE]), times[DENSE])
        cells["bound"] = f"{1e3 * full:.2f} ms for {problem.touched * one / 1e6:.0f} MB; dense {dense}"
        cells |= {"best peer / ours": best_peer(times, mine, device), "error": worst(field, mine)}
        rows.append(Row(what, str(case), dtype, cells, field.left_out))
    return rows


def growth(cases: Sequence[Case], dtype: str, device: str, seconds: float) -> list[Row]:
    """A row for each number of tokens: forward+backward time per token of ours over that at the number before; 1 is
    linear growth. The bound is the dense network's."""
    mine = resolve_backend("auto", device, getattr(torch, dtype))
    left_out: dict[str, str] = {}
    runs: dict[str, Callable[[], None]] = {}
    for case in cases:
        problem = build(case, getattr(torch, dtype), device)
        field = right(problem, (mine,), passes=(True,))
        left_out |= field.left_out
        for name, contender in field.taking_part.items():
            runs[f"{name} {case.tokens}"] = lambda p=problem, c=contender: p.step(c, True)
    times = in_turn(runs, seconds, slow=float("inf"), warm=int(device == "cuda"), clock=clock_of(device))
    rows = []
    for before, after in itertools.pairwise(cases):
        scale = before.tokens / after.tokens
        per_token = {
            name: ratio([scale * one for one in times[f"{name} {after.tokens}"]], times[f"{name} {before.tokens}"])
            for name in (DENSE, mine)
            if f"{name} {after.tokens}" in times and f"{name} {before.tokens}" in times
        }
        cells = {"bound": f"dense {per_token.pop(DENSE)}"} | per_token
        rows.append(Row("growth per token", f"{after} / {before.tokens}", dtype, cells, left_out))
    return rows


def jobs(
    section: str,
    cases: Sequence[Case],
    dtypes: Sequence[str],
    device: str,
    seconds: float,
    machine: Machine,
) -> Iterator[Job]:
    """Jobs of the sections `experts`, `held-out`, `few`, `growth` and `kept`."""
    if section == "growth":
        named = f"{cases[0]} to {cases[-1].tokens}"
        for dtype in dtypes:
            yield Job(section, named, dtype, partial(growth, cases, dtype, device, 2 * seconds))
        return
    measure = {"few": few_tokens, "kept": with_kept_pages}.get(section, against_dense)
    for case, dtype in itertools.product(cases, dtypes):
        yield Job(section, str(case), dtype, partial(measure, case, dtype, device, seconds, machine))
