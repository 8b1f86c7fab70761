"""The record of downstream tasks: `crossways harness` writes one JSON file of this form."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict

from crossways.evaluation.executed import RoutingRecord
from crossways.settings import Settings

RATES = ("acc", "acc_norm", "exact_match", "em", "f1")
"""Metrics between 0 and 1 whose mean over tasks is customary."""


class HarnessProtocol(Settings):
    """How tasks were run; figures of different protocols must not be compared."""

    batch_size: int
    """Sequences per forward pass; changes figures only of rules that are not batch-invariant."""
    max_length: int
    """Most tokens of a sequence; longer ones lose their beginning."""
    truncated: int
    """Scored requests that did."""
    requests: int
    """Requests scored or generated."""
    padding_side: str
    """Where scored sequences are padded; padding is masked."""
    max_gen_toks: int
    """Most tokens of an answer where the task does not say."""
    limit: int | None
    """Only so many documents of each task; None for all."""
    dtype: str
    """Of the model's weights."""


class TaskFigures(Settings):
    """One task."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    task: str
    """Its name in lm-eval."""
    label: str
    """What the paper of the list calls it, or the name again."""
    metric: str
    """The headline metric, with its filter."""
    value: float
    """The headline figure."""
    stderr: float | None
    """Its standard error over documents; None where there is none."""
    num_fewshot: int | None
    """Examples in the prompt."""
    documents: int | None
    """Documents evaluated."""
    version: str
    """Of the task."""
    metrics: dict[str, float]
    """Every figure of the task by `metric,filter`."""


class HarnessRecord(Settings):
    """Everything that was measured, and under what."""

    format: Literal["crossways-harness/1"] = "crossways-harness/1"
    model: str
    """Folder or hub name, or whatever the caller named the model."""
    routing: RoutingRecord
    """Rule, who decided, cutoffs and what was executed. `leaky` marks every figure of the record."""
    protocol: HarnessProtocol
    tasks: tuple[TaskFigures, ...]
    """In the order asked for."""
    mean: float | None
    """Mean of the headline figures, if all are rates such as accuracy."""
    libraries: dict[str, str]
    """Versions."""


def mean_of_rates(tasks: tuple[TaskFigures, ...]) -> float | None:
    """Mean of the headline figures; None unless all are rates."""
    if not tasks or any(task.metric.partition(",")[0] not in RATES for task in tasks):
        return None
    return sum(task.value for task in tasks) / len(tasks)
