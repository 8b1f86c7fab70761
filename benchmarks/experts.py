"""Rows of expert compute: with many tokens beside a dense network of the same active size, with few beside the rate
at which the machine reads memory, and how cost grows with the number of tokens.

Every contender is first compared with `naive`, output and gradients; who is wrong is not timed. Then all run in turn,
again and again; each time is divided by the dense network's of the same round. Making the assignment from top-k
indices is part of every time, as sorting is in transformers' functions.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from contenders import DENSE, OURS, PEERS, make, right
from crossways.experts import resolve_backend
from measure import Times, clock_of, in_turn, peak_bandwidth, peak_flops, ratio
from problems import Case, Contender, Problem, build
from table import Job, Row

PASSES = ("forward", "forward+backward")


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


def timed(problem: Problem, contenders: dict[str, Contender], seconds: float, backward: bool) -> Times:
    """Seconds of each contender, round by round."""

    def one(contender: Contender) -> Callable[[], None]:
        return lambda: problem.step(contender, backward)

    runs = {name: one(contender) for name, contender in contenders.items()}
    return in_turn(runs, seconds, warm=1 + (problem.device == "cuda"), clock=clock_of(problem.device))


def against_dense(case: Case, dtype: str, device: str, seconds: float, machine: Machine) -> list[Row]:
    """Two rows, forward and forward+backward: time / dense of everybody."""
    problem = build(case, getattr(torch, dtype), device)
    taking_part, errors, left_out = right(problem, everybody(device))
    problem.reference.clear()
    mine = resolve_backend("auto", device, problem.dtype)
    worst = f"{errors[mine]:.0e}" if mine in errors else "-"
    rows = []
    for backward, what in enumerate(PASSES):
        times = timed(problem, taking_part, seconds, bool(backward))
        dense = statistics.median(times[DENSE])
        share = case.flops * (1, 3)[backward] / dense / machine.flops_in(dtype)
        bound = f"{1e3 * dense:.1f} ms, {share:.2f} of peak"
        if device == "cuda":
            bound += f", {peak_memory(problem, taking_part[DENSE]):.2f} GB"
        cells = {"bound": bound, "error": worst, "best peer / ours": best_peer(times, mine, device)}
        for name in times.keys() - {DENSE}:
            cells[name] = ratio(times[name], times[DENSE])
            if device == "cuda" and backward:
                cells[name] += f", {peak_memory(problem, taking_part[name]):.2f} GB"
        rows.append(Row(what, str(case), dtype, cells, left_out))
    return rows


def best_peer(times: Times, mine: str, device: str) -> str:
    """How many times faster than the fastest peer; a dash without peers."""
    peers = [name for name in PEERS[device] if name in times]
    if not peers or mine not in times:
        return "-"
    fastest = min(peers, key=lambda name: statistics.median(times[name]))
    return ratio(times[fastest], times[mine])


def peak_memory(problem: Problem, contender: Contender) -> float:
    """GB that forward and backward take beyond what is there before, on a CUDA device."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    problem.step(contender, backward=True)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def few_tokens(case: Case, dtype: str, device: str, seconds: float, machine: Machine) -> list[Row]:
    """One row: bytes of the touched experts' matrices per second over the best reading rate."""
    problem = build(case, getattr(torch, dtype), device)
    taking_part, errors, left_out = right(problem, everybody(device))
    times = timed(problem, taking_part, seconds / 2, backward=False)
    mine = resolve_backend("auto", device, problem.dtype)
    full = problem.touched / machine.bytes_per_second()
    cells = {name: ratio([full] * len(spent), spent) for name, spent in times.items() if name != DENSE}
    cells["bound"] = f"{1e3 * full:.2f} ms to read {problem.touched / 1e6:.0f} MB"
    cells["best peer / ours"] = best_peer(times, mine, device)
    cells["error"] = f"{errors[mine]:.0e}" if mine in errors else "-"
    return [Row("few tokens", str(case), dtype, cells, left_out)]


def growth(cases: Sequence[Case], dtype: str, device: str, seconds: float) -> list[Row]:
    """A row for each number of tokens: forward+backward time per token of ours over that at the number before; 1 is
    linear growth. The bound is the dense network's."""
    mine = resolve_backend("auto", device, getattr(torch, dtype))
    problems = [build(case, getattr(torch, dtype), device) for case in cases]
    wrong = {}
    for problem in problems[:2]:  # the larger ones are the same code on more rows
        _, _, left_out = right(problem, (mine,))
        wrong |= left_out
        problem.reference.clear()
    runs: dict[str, Callable[[], None]] = {}
    for problem in problems:
        for name in (DENSE, mine):
            contender = make(problem, name)
            runs[f"{name} {problem.case.tokens}"] = lambda p=problem, c=contender: p.step(c, True)
    times = in_turn(runs, seconds * len(cases), slow=float("inf"), warm=1, clock=clock_of(device))
    rows = []
    for before, after in itertools.pairwise(cases):
        scale = before.tokens / after.tokens
        per_token = {
            name: ratio([scale * one for one in times[f"{name} {after.tokens}"]], times[f"{name} {before.tokens}"])
            for name in (DENSE, mine)
        }
        cells = {"bound": f"dense {per_token[DENSE]}", mine: per_token[mine]}
        rows.append(Row("growth per token", f"{after} / {before.tokens}", dtype, cells, wrong))
    return rows


def jobs(
    section: str,
    cases: Sequence[Case],
    dtypes: Sequence[str],
    device: str,
    seconds: float,
    machine: Machine,
) -> Iterator[Job]:
    """Jobs of the sections `experts`, `few` and `growth`."""
    if section == "growth":
        named = f"{cases[0]} to {cases[-1].tokens}"
        yield from (Job(section, named, dtype, partial(growth, cases, dtype, device, seconds)) for dtype in dtypes)
        return
    measure = {"experts": against_dense, "few": few_tokens}[section]
    for case, dtype in itertools.product(cases, dtypes):
        yield Job(section, str(case), dtype, partial(measure, case, dtype, device, seconds, machine))
