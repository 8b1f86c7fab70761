"""Runs side by side, each in a process of its own that never outlives the study."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers.utils import logging

from crossways.errors import UserError
from crossways.study.execute import execute
from crossways.study.plan import Run
from crossways.study.record import RunRecord


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    run: Run
    record: RunRecord | None = None
    """The record of a run that finished."""
    error: BaseException | None = None
    """What stopped it otherwise."""


def run_all(
    runs: Sequence[Run], cache_dir: Path, *, workers: int, threads: int | None, progress: bool
) -> Iterator[Outcome]:
    """Execute runs and yield each outcome as it comes; an error ends its run and no other.

    Args:
        runs: what to do, in order.
        cache_dir: shared by the runs.
        workers: processes; with 1, runs take place in this process.
        threads: torch threads per run; None divides the cores.
        progress: with one worker, show the trainer's progress bar; otherwise output goes to each run's `log.txt`.
    """
    threads = threads or max(1, available_cores() // workers)
    if workers == 1:
        with _torch_threads(threads):
            for run in runs:
                yield _outcome(run, partial(_execute_shown if progress else _execute_logged, run, cache_dir))
        return
    with _pool(min(workers, len(runs)), threads) as pool:
        futures: dict[Future[RunRecord], Run] = {pool.submit(_execute_logged, run, cache_dir): run for run in runs}
        for future in as_completed(futures):
            yield _outcome(futures[future], future.result)


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _outcome(run: Run, result: Callable[[], RunRecord]) -> Outcome:
    try:
        return Outcome(run, record=result())
    except BrokenProcessPool as error:
        message = "the process died, most likely of lack of memory; lower workers or training.batch_size"
        return Outcome(run, error=UserError(message).with_traceback(error.__traceback__))
    except Exception as error:  # a failed run must not cost the others their results; the caller reports it
        return Outcome(run, error=error)


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _pool(workers: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end with this one, however it ends: they hold a pipe that breaks with it."""
    context = multiprocessing.get_context("spawn")  # a fork would inherit torch's threads half-alive
    leash, holder = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(leash, threads))
    try:
        yield pool
    except BaseException:  # an interrupt, or a caller that stops listening
        holder.close()  # ends the workers at once; their runs go on from their checkpoints next time
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    finally:
        pool.shutdown(wait=True)
        holder.close()
        leash.close()


def _execute_shown(run: Run, cache_dir: Path) -> RunRecord:
    return execute(run, cache_dir, progress=True)


def _execute_logged(run: Run, cache_dir: Path) -> RunRecord:
    """`execute` with all output in the run's `log.txt`, where runs side by side do not garble each other's."""
    with (
        (run.folder / "log.txt").open("a", buffering=1, encoding="utf-8") as log,
        redirect_stdout(log),
        redirect_stderr(log),
    ):
        return execute(run, cache_dir, progress=False)


def _start_worker(leash: Connection, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the study decides what an interrupt means
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    threading.Thread(target=_end_with, args=(leash,), daemon=True).start()


def _end_with(leash: Connection) -> None:
    leash.poll(None)  # nothing is ever sent: readable means that the other end is gone
    os._exit(1)
