"""Wall time of scoring and of generation, the original and the chosen routing in turn.

Legend: B batch, S sequence.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crossways.experts.register import NAME, register_experts
from crossways.surgery.rule import Rule
from crossways.tuning.bench import Bench, Estimates
from crossways.tuning.settings import TuningSettings
from crossways.tuning.texts import Text

PROMPT = 16
"""Tokens before a timed generation."""


@dataclass(frozen=True)
class Timed:
    """One task under both routings, in tokens per second."""

    task: str
    rounds: int
    original: float
    """Median over rounds."""
    chosen: float
    """Median over rounds."""
    speedup: float
    """Median over rounds of the ratio chosen / original; above 1 is faster."""
    speedup_low: float
    """First quartile of the ratio."""
    speedup_high: float
    """Third quartile of the ratio."""
    by_experts: float | None = None
    """What the same original gains from our expert compute alone, median of the ratio: this part of the speedup is
    not due to the routing. None where both compute experts alike."""


@dataclass(frozen=True)
class Timing:
    """All tasks, and the conditions."""

    timed: tuple[Timed, ...]
    threads: int
    device: str
    experts: str
    """transformers' implementation of the experts."""
    load: float
    """The machine's load average over the last minute, when the timing began; above the threads' number, other
    programs were in the way."""
    chosen_experts: str = ""
    """Who computes the chosen pairs, where that is not the same: `crossways`."""


def time_both(bench: Bench, rule: Rule, estimates: Estimates | None, text: Text, settings: TuningSettings) -> Timing:
    """Time the bare model, without any hook of ours, against the chosen routing. Each round runs both, in changing
    order, so that what slows the machine down for a while slows both."""
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else 0.0
    ids_BS = _full_windows(text, settings.prefill_rows).to(bench.model.device)
    tasks: list[tuple[str, int, Callable[[], Any]]] = [
        (f"scoring, {len(ids_BS)} x {ids_BS.shape[1]} tokens", ids_BS.numel(), lambda: _score(bench.model, ids_BS))
    ]
    for rows in settings.decode_rows if hasattr(type(bench.model), "generate") else ():
        prompt_BS = ids_BS[:1, :PROMPT].expand(rows, -1)

        def generate(prompt_BS: Tensor = prompt_BS) -> None:
            _generate(bench.model, prompt_BS, settings.decode_tokens)

        tasks.append((f"generation, {rows} at a time", rows * settings.decode_tokens, generate))
    config = bench.model.config
    ours = _ours(bench, rule, estimates) and getattr(config, "_experts_implementation", None) != NAME
    timed = [_time(bench, rule, estimates, *task, settings.rounds, ours=ours) for task in tasks]
    return Timing(
        timed=tuple(timed),
        threads=torch.get_num_threads(),
        device=str(bench.model.device),
        experts=str(getattr(config, "_experts_implementation", None) or "eager"),
        load=load,
        chosen_experts=NAME if ours else "",
    )


def _ours(bench: Bench, rule: Rule, estimates: Estimates | None) -> bool:
    with bench.routed(rule, estimates) as handle:
        return any(block.ragged is not None and not isinstance(block.ragged.plan(), str) for block in handle.blocks)


@contextmanager
def _computing_by_ours(model: Any) -> Iterator[None]:
    """The original, its experts computed by our expert compute while the context lasts."""
    register_experts()
    before = model.get_experts_implementation()
    model.set_experts_implementation(NAME)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _time(
    bench: Bench,
    rule: Rule,
    estimates: Estimates | None,
    task: str,
    tokens: int,
    run: Callable[[], Any],
    rounds: int,
    *,
    ours: bool,
) -> Timed:
    routings: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "original": nullcontext,
        "chosen": lambda: bench.routed(rule, estimates),
    }
    if ours:
        routings["by experts"] = lambda: _computing_by_ours(bench.model)
    second: dict[str, list[float]] = {name: [] for name in routings}
    for number in range(-1, rounds):  # the round before the first warms up and is not counted
        for name in list(routings) if number % 2 else list(routings)[::-1]:
            with routings[name]():
                started = _now(bench.model)
                run()
                elapsed = _now(bench.model) - started
            if number >= 0:
                second[name].append(elapsed)
    original, chosen = (np.asarray(second[name]) for name in ("original", "chosen"))
    low, middle, high = np.quantile(original / chosen, [0.25, 0.5, 0.75]).tolist()
    before, after = (tokens / float(np.median(seconds)) for seconds in (original, chosen))
    alone = float(np.median(original / np.asarray(second["by experts"]))) if ours else None
    return Timed(task, rounds, before, after, middle, low, high, alone)


def _full_windows(text: Text, rows: int) -> Tensor:
    """The longest windows of a text, cut to one length: no padding, which the two routings treat differently; int64
    (B, S)."""
    windows = text.window_W[:rows]
    length = min(len(window.input_ids) for window in windows)
    return torch.stack([torch.from_numpy(window.input_ids[:length]) for window in windows])


@torch.inference_mode()
def _score(model: Any, ids_BS: Tensor) -> None:
    model(input_ids=ids_BS, use_cache=False)


@torch.inference_mode()
def _generate(model: Any, prompt_BS: Tensor, new: int) -> None:
    model.generate(
        input_ids=prompt_BS,
        attention_mask=torch.ones_like(prompt_BS),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=int(prompt_BS[0, 0]),
    )


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


NOTES = {
    "eager": "one expert after the other, each on the rows that chose it: fewer pairs are fewer rows per product",
    "grouped_mm": "rows sorted by expert and multiplied in one grouped product: fewer pairs are fewer rows",
    "batched_mm": "the weights of an expert are copied for each row: time follows the number of rows, and memory too",
}
"""What transformers' implementations of the experts do with the pairs they are given."""


def notes(timing: Timing, sequence: Sequence[float]) -> list[str]:
    """What to know when reading the times.

    Args:
        timing: the times.
        sequence: mean executed experts of each layer under the chosen routing.
    """
    ragged = any(abs(each - round(each)) > 1e-9 for each in sequence)
    found = [f"Experts are computed by {timing.experts}: {NOTES.get(timing.experts, 'unknown to us')}."]
    if timing.chosen_experts:
        found.append(
            f"Under the chosen routing they are computed by {timing.chosen_experts}, which takes pairs as they are. "
            "The original would run at another speed with that, too; only what is beyond it is due to fewer pairs."
        )
        found += [f"{each.task}: by the experts alone × {each.by_experts:.2f}." for each in timing.timed]
    elif ragged:
        found.append(
            "Tokens choose different numbers of experts, so each chosen pair is handed to the experts as a row of "
            "its own and summed up afterwards: a gather and a scatter that the original does not need."
        )
    found.append(
        "The original was timed without any hook; the chosen routing includes the cost of deciding anew, which is "
        "fixed per layer and weighs most in generation, where the experts' work per step is smallest. There the time "
        "goes into reading weights: fewer pairs help only where they touch fewer experts."
    )
    if timing.load > timing.threads:
        found.append(f"The machine was in use (load average {timing.load:g}), which widens the spread.")
    return found
