"""What training measures of itself without waiting for the device: the first loss that is not finite, and the time of
its steps."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor


class FiniteWatch:
    """Remembers, on the device, the first loss that is not finite."""

    def __init__(self, device: torch.device) -> None:
        self._step = torch.zeros((), dtype=torch.long, device=device)
        self._loss = torch.zeros((), device=device)

    def note(self, loss: Tensor, step: int) -> None:
        """Look at a loss, without waiting for it.

        Args:
            loss: floating point scalar.
            step: its number, 1 first.
        """
        loss = loss.detach().to(self._loss)
        first = ~torch.isfinite(loss) & (self._step == 0)
        self._step = torch.where(first, step, self._step)
        self._loss = torch.where(first, loss, self._loss)

    def found(self) -> tuple[int, float] | None:
        """Step and value of the first loss that was not finite, or None. Waits for the device."""
        step = int(self._step)
        return (step, float(self._loss)) if step else None


class StepTimer:
    """Seconds of each optimizer step: by the clock on a CPU, by the device's own on a GPU."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._start: float | torch.cuda.Event = 0.0

    def start(self, device: torch.device) -> None:
        """A step begins."""
        self._start = _mark(device)

    def stop(self, device: torch.device) -> None:
        """It has ended, or on a GPU, been handed over."""
        self._spans.append((self._start, _mark(device)))  # type: ignore[arg-type]

    def collect(self) -> dict[str, float]:
        """Median (`step_seconds`) and sum (`interval_seconds`) of the steps since the last call; empty without any.
        Waits for the device."""
        seconds = [_seconds(*span) for span in self._spans]
        self._spans = []
        return {"step_seconds": statistics.median(seconds), "interval_seconds": sum(seconds)} if seconds else {}


def _mark(device: torch.device) -> float | torch.cuda.Event:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _seconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, float) and isinstance(stop, float):
        return stop - start
    assert isinstance(start, torch.cuda.Event)
    assert isinstance(stop, torch.cuda.Event)
    stop.synchronize()
    return start.elapsed_time(stop) / 1000
