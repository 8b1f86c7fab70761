"""Timing for the benchmarks: contenders in turn, ratios within a round, the machine's own limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Times = dict[str, list[float]]


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 3,
    most: int = 15,
    after: Callable[[], object] = lambda: None,
) -> Times:
    """Seconds of each contender, round by round, all of them in every round, after two rounds that do not count.

    Args:
        contenders: what to time.
        seconds: take as many rounds as fit into this, within `least` and `most`.
        least: rounds at least.
        most: rounds at most.
        after: called after each, outside the time.
    """
    times: Times = {name: [] for name in contenders}
    warm, started = 2, 0.0
    for done in range(warm + most):
        if done == warm - 1:
            started = time.perf_counter()  # one round as a sample of what a round takes
        elif done >= warm + least:
            passed = time.perf_counter() - started
            if passed * (done + 1) / (done - warm + 1) > seconds:
                break
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            elapsed = time.perf_counter() - start
            after()
            if done >= warm:
                times[name].append(elapsed)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the round-by-round ratios, and half their interquartile range."""
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}±{(high - low) / 2:.2f}"


def peak_flops(dtype: torch.dtype, size: int = 3072) -> float:
    """FLOP/s of this machine's best square matrix product."""
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    out = torch.empty_like(a)
    times = in_turn({"mm": lambda: torch.mm(a, b, out=out)}, seconds=3.0)["mm"]
    return 2 * size**3 / min(times)


def peak_bandwidth(mebibytes: int = 512) -> float:
    """Bytes per second at which this machine sums a large tensor."""
    x = torch.zeros(mebibytes * 2**18)
    return 4 * x.numel() / min(in_turn({"sum": x.sum}, seconds=3.0)["sum"])


def line(cells: Sequence[object]) -> None:
    """Print one row of a Markdown table at once, so that a run can be watched and what it printed be kept."""
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def head(title: str, columns: Sequence[str]) -> None:
    """Print a table's title and its head."""
    print(f"\n{title}\n", flush=True)
    line(columns)
    line(["---"] * len(columns))
