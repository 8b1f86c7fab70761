"""Timing for the benchmarks: contenders in turn, ratios within a round, the machine's own limits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Times = dict[str, list[float]]
Clock = Callable[[Callable[[], object]], float]
"""Runs something once and says how many seconds that took."""


def wall_clock(run: Callable[[], object]) -> float:
    """Seconds by the host's clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def device_clock(run: Callable[[], object]) -> float:
    """Seconds by the CUDA device's clock."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def clock_of(device: str) -> Clock:
    """The one to use for work on a device."""
    return device_clock if device == "cuda" else wall_clock


def in_turn(
    contenders: Mapping[str, Callable[[], object]],
    seconds: float,
    least: int = 3,
    most: int = 60,
    warm: int = 2,
    after: Callable[[], object] = lambda: None,
    slow: float = 8.0,
    clock: Clock = wall_clock,
) -> Times:
    """Seconds of each contender, round by round, all of them in every round, after rounds that do not count.

    Args:
        contenders: what to time; the first is what the others are compared with.
        seconds: take as many rounds as fit into this, within `least` and `most`.
        least: rounds at least.
        most: rounds at most.
        warm: rounds that do not count, at least 1.
        after: called after each, outside the time.
        slow: who takes more than so many times the first contender's time while warming up, and more than a tenth of
            `seconds`, is not run again and has that one time alone.
        clock: how to time.
    """
    times: Times = {name: [] for name in contenders}
    given_up: Times = {}
    started = 0.0
    for done in range(warm + most):
        if done == warm - 1:
            started = time.perf_counter()  # one round as a sample of what a round takes
        elif done >= warm + least:
            passed = time.perf_counter() - started
            if passed * (done + 1) / (done - warm + 1) > seconds:
                break
        first = 0.0
        for name, run in contenders.items():
            if name in given_up:
                continue
            elapsed = clock(run)
            after()
            first = first or elapsed
            if done < warm and elapsed > max(slow * first, seconds / 10):
                given_up[name] = [elapsed]
            elif done >= warm:
                times[name].append(elapsed)
    return times | given_up


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the round-by-round ratios, and half their interquartile range; of one that was run once, its ratio to
    the other's median, said to be such."""
    if min(len(ours), len(theirs)) == 1:
        return f"{statistics.median(ours) / statistics.median(theirs):.1f} once"
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}±{(high - low) / 2:.2f}"


def peak_flops(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of this machine's best square matrix product."""
    size = 3072 if device == "cpu" else 8192
    a, b = torch.rand(size, size, device=device).to(dtype), torch.rand(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    times = in_turn({"mm": lambda: torch.mm(a, b, out=out)}, seconds=2.0, clock=clock_of(device))["mm"]
    return 2 * size**3 / min(times)


def peak_bandwidth(device: str = "cpu", mebibytes: int = 512) -> float:
    """Bytes per second at which this machine sums a large tensor."""
    x = torch.zeros(mebibytes * 2**18, device=device)
    return 4 * x.numel() / min(in_turn({"sum": x.sum}, seconds=2.0, clock=clock_of(device))["sum"])
