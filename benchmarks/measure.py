"""Timing for the benchmarks: contenders in turn, ratios within a round, the machine's own limits."""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from crossways.native.loading import why_not_native
from crossways.native.memory import settle

Times = dict[str, list[float]]
Clock = Callable[[Callable[[], object]], float]
"""Runs something once and says how many seconds that took."""
ENOUGH = 2
"""Rounds that those have at least who are not `wanted` to the end."""


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
    known: Mapping[str, float] | None = None,
    wanted: Callable[[Times], Collection[str]] | None = None,
) -> Times:
    """Seconds of each contender, round by round, all of them in every round, after rounds that do not count.

    Args:
        contenders: what to time; the first is what the others are compared with.
        seconds: take as many rounds as fit into this, within `least` and `most`.
        least: rounds at least.
        most: rounds at most.
        warm: rounds that do not count.
        after: called after each, outside the time.
        slow: who takes more than so many times the first contender's time before the rounds that count, or in the
            first of them, and more than a tenth of `seconds`, is not run again and has that one time alone, unless
            `wanted`.
        clock: how to time.
        known: seconds that each took in a run before this one. It may have been slow for being the first, so it drops
            nobody who took less than four times `seconds`.
        wanted: given the times so far, who goes on when half of `seconds` has passed; None for all.
    """
    before, dropped = dict(known or {}), set()

    def drop(beyond: float) -> None:
        limit = max(slow * before.get(first, math.inf), beyond)
        kept = wanted({name: [spent] for name, spent in before.items()}) if wanted and before else ()
        dropped.update(name for name, spent in before.items() if spent > limit and name not in kept)

    first = next(iter(contenders))
    drop(4 * seconds)
    for _ in range(warm):
        for name, run in contenders.items():
            if name not in dropped:
                before[name] = clock(run)
                after()
        drop(seconds / 10)
    running = [name for name in contenders if name not in dropped]
    times: Times = {name: [] if name in running else [before[name]] for name in contenders}
    started = time.perf_counter()
    for done in range(1, most + 1):
        for name in running:
            before[name] = clock(contenders[name])
            times[name].append(before[name])
            after()
        if done == 1:
            drop(seconds / 10)
            running = [name for name in running if name not in dropped]
        passed = time.perf_counter() - started
        if done >= least and passed * (done + 1) / done > seconds:
            break
        if done >= ENOUGH and passed > seconds / 2 and wanted is not None:
            running = [name for name in running if name in wanted(times)]
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """Median of the round-by-round ratios, and half their interquartile range, over the rounds that both took part
    in; of one that was run once, its ratio to the other's median, said to be such."""
    if min(len(ours), len(theirs)) == 1:
        return f"{statistics.median(ours) / statistics.median(theirs):.1f} once"
    ratios = [one / other for one, other in zip(ours, theirs, strict=False)]  # who stopped early stopped for good
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.2f}±{(high - low) / 2:.2f}"


def peak_flops(dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of this machine's best square matrix product."""
    size = 3072 if device == "cpu" else 8192
    a, b = torch.rand(size, size, device=device).to(dtype), torch.rand(size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    times = in_turn({"mm": lambda: torch.mm(a, b, out=out)}, seconds=2.0, clock=clock_of(device))["mm"]
    return 2 * size**3 / min(times)


def peak_bandwidth(device: str = "cpu", mebibytes: int = 512, seconds: float = 3.0) -> float:
    """Bytes per second at which this machine adds up a large tensor, or its squares, whichever is faster. The tensor
    lies on large pages where there are any, as the matrices do: read from small ones it is up to a third slower."""
    x = torch.ones(mebibytes * 2**18, device=device)
    if device == "cpu" and why_not_native() is None:
        settle(x)
    times = in_turn({"sum": x.sum, "dot": lambda: torch.dot(x, x)}, seconds, clock=clock_of(device))
    return 4 * x.numel() / min(map(min, times.values()))


def keep_pages() -> bool:
    """Have the C library keep the memory that is given back, for all that this process does from now on.

    By default it returns every block above 32 MiB to the system, which clears its pages when they are touched anew.

    Returns:
        False where it has no such setting (it is glibc's).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    trim_threshold, most_mapped = -1, -4  # M_TRIM_THRESHOLD, M_MMAP_MAX of malloc.h
    return mallopt is not None and bool(mallopt(most_mapped, 0) and mallopt(trim_threshold, -1))
