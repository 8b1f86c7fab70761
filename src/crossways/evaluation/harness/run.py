"""Run tasks of lm-eval on a routed model and keep the routing with the figures."""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from typing import Any

from transformers import PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.evaluation.executed import Executed, decided_by
from crossways.evaluation.harness.record import HarnessProtocol, HarnessRecord, TaskFigures, mean_of_rates
from crossways.evaluation.padding import Side
from crossways.evaluation.task_lists import ListedTask, find_tasks
from crossways.extras import require, versions
from crossways.surgery.attach import own_routing

BAR = re.compile(r"\d+%\||\d+ examples \[|\?it/s")
"""What progress bars look like."""


def evaluate_harness(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str | ListedTask],
    *,
    causal: bool = True,
    batch_size: int = 8,
    max_length: int | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    padding_side: Side = "right",
    bootstrap_iters: int = 1000,
    name: str = "",
    progress: bool = False,
) -> HarnessRecord:
    """Evaluate a model in memory.

    A rule that looks at later tokens would see a continuation before it is scored, so the decode twins decide unless
    `causal` is false; every figure is then marked as leaky if the rule is.

    Args:
        model: of crossways, or of transformers, rerouted or not; put in evaluation mode for the duration.
        tokenizer: the model's.
        tasks: lm-eval's names, task files, or a list's name or file; a string may hold several, with commas.
        causal: let the decode twins decide.
        batch_size: sequences per forward pass.
        max_length: most tokens of a sequence; the model's context by default.
        num_fewshot: examples in the prompt of tasks that do not say.
        limit: only so many documents of each task.
        padding_side: of scored sequences.
        bootstrap_iters: resamples behind standard errors that have no formula; 0 for no standard errors.
        name: what the record calls the model.
        progress: show progress bars.

    Raises:
        UserError: lm-eval is not installed, a task does not exist, or a twin has nothing to go by yet.
    """
    require("lm_eval", extra="eval")
    from crossways.evaluation.harness.model import RoutedLM
    from crossways.evaluation.harness.tasks import load_tasks

    listed = listed_tasks(tasks)
    was_training = model.training
    with own_routing(model, needed=False), decided_by(model, causal=causal) as causal, _quiet(progress):
        executed = Executed(model)
        found, names = load_tasks(listed, num_fewshot)
        lm = RoutedLM(
            model,
            tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            padding_side=padding_side,
            causal=causal,
            progress=progress,
        )
        try:
            with executed.counting():
                results = _evaluate(lm, found, limit, bootstrap_iters)
        finally:
            model.train(was_training)
        routing = executed.record(causal=causal)
    figures = tuple(task_figures(each, entry, results) for each, entry in zip(names, listed, strict=True))
    return HarnessRecord(
        model=name or type(model).__name__,
        routing=routing,
        protocol=HarnessProtocol(
            batch_size=batch_size,
            max_length=lm.max_length,
            truncated=lm.truncated,
            requests=lm.requests,
            padding_side=padding_side,
            max_gen_toks=lm.max_gen_toks,
            limit=limit,
            dtype=str(model.dtype).removeprefix("torch."),
        ),
        tasks=figures,
        mean=mean_of_rates(figures),
        libraries=versions("lm_eval", "transformers", "torch", "datasets"),
    )


def listed_tasks(tasks: str | Sequence[str | ListedTask]) -> list[ListedTask]:
    """Every task of names, files and lists."""
    if isinstance(tasks, str):
        return find_tasks(tasks, "lm-eval")[0]
    return [each for task in tasks for each in ([task] if isinstance(task, ListedTask) else listed_tasks(task))]


def _evaluate(lm: Any, found: dict[str, Any], limit: int | None, bootstrap_iters: int) -> Mapping[str, Any]:
    from lm_eval.evaluator import evaluate

    results = evaluate(lm, found, limit=limit, bootstrap_iters=bootstrap_iters, log_samples=False)
    assert results is not None  # only ranks other than the first get none
    return results


def task_figures(name: str, entry: ListedTask, results: Mapping[str, Any]) -> TaskFigures:
    """One task's figures out of lm-eval's results; raises `UserError` if it has no such metric."""
    said = results["results"][name]
    metrics = {key: float(value) for key, value in said.items() if "," in key and isinstance(value, int | float)}
    headline = [key for key in metrics if "_stderr," not in key]
    wanted = [key for key in headline if entry.metric in (None, key, key.partition(",")[0])]
    if not wanted:
        raise UserError(f"task {name} has no metric {entry.metric!r}; it has {', '.join(headline)}")
    metric, _, filtered = wanted[0].partition(",")
    counts = results.get("n-samples", {}).get(name)
    return TaskFigures(
        task=name,
        label=entry.label or name,
        metric=wanted[0],
        value=metrics[wanted[0]],
        stderr=metrics.get(f"{metric}_stderr,{filtered}"),
        num_fewshot=results.get("n-shot", {}).get(name),
        documents=counts["effective"] if counts else None,
        version=str(results.get("versions", {}).get(name, "")),
        metrics=metrics,
    )


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Without progress bars, standard error gets what else is said there; lm-eval's own log is left out, since the
    record says it better."""
    if progress:
        yield
        return
    logger = logging.getLogger("lm_eval")
    before, said = logger.level, io.StringIO()
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(said):  # the bars of building requests cannot be switched off
            yield
    finally:
        logger.setLevel(before)
        lines = [line for line in re.split(r"[\r\n]+", said.getvalue()) if line.strip() and not BAR.search(line)]
        sys.stderr.write("".join(f"{line}\n" for line in lines))
