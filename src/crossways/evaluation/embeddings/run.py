"""Run tasks of mteb on a routed model and keep the routing with the figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from crossways.errors import UserError
from crossways.evaluation.embeddings.encoder import RoutedEncoder
from crossways.evaluation.embeddings.record import EmbeddingRecord, EmbeddingTask
from crossways.evaluation.task_lists import TASK_FILES, ListedTask
from crossways.extras import require, versions
from crossways.study.load import parse_yaml, validated


def evaluate_embeddings(
    encoder: RoutedEncoder,
    tasks: Sequence[ListedTask],
    *,
    name: str = "model",
    fitted_on: str | None = None,
    progress: bool = False,
) -> EmbeddingRecord:
    """Evaluate an encoder; nothing is cached, so every figure is measured.

    Args:
        encoder: what embeds.
        tasks: mteb's names, or paths of task files (`crossways.evaluation.embeddings.local_tasks.LocalTask`).
        name: what the record calls the model.
        fitted_on: where its fitted statistics come from, for the record.
        progress: show progress bars.

    Raises:
        UserError: mteb is not installed, a task does not exist, or its data cannot be had.
    """
    require("mteb", "sentence_transformers", extra="eval")
    import mteb

    from crossways.evaluation.embeddings.mteb_encoder import MtebEncoder

    model: Any = MtebEncoder(encoder, name=f"local/{Path(name).name}")
    figures = []
    for entry in tasks:
        task = find_task(entry.task)
        try:
            said = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=progress)
        except OSError as error:
            raise UserError(f"task {entry.task}: its data cannot be loaded: {error}") from error
        figures.append(task_figures(task, entry, said.task_results[0]))
    types = dict.fromkeys(task.type for task in figures)
    return EmbeddingRecord(
        model=name,
        settings=encoder.settings,
        fitted_on=fitted_on,
        width=encoder.width,
        routing=encoder.record(),
        tasks=tuple(figures),
        mean_by_type={kind: fmean(task.value for task in figures if task.type == kind) for kind in types},
        mean=fmean(task.value for task in figures),
        libraries=versions("mteb", "sentence-transformers", "transformers", "torch"),
    )


def find_task(name: str) -> Any:
    """An mteb task by its name, or by the path of a task file."""
    import mteb

    if Path(name).suffix in TASK_FILES:
        from crossways.evaluation.embeddings.local_tasks import LocalTask, build_task

        path = Path(name)
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot read task file {path}: {error.strerror}") from error
        source = f"task file {path}"
        return build_task(validated(LocalTask, parse_yaml(text, source), source), path.parent)
    try:
        return mteb.get_task(name, languages=["eng"])
    except KeyError as error:
        raise UserError(f"mteb has no task of this name: {error.args[0] if error.args else name}") from error


def task_figures(task: Any, entry: ListedTask, result: Any) -> EmbeddingTask:
    """One task's figures out of mteb's results; raises `UserError` if it has no such metric."""
    metric = entry.metric or task.metadata.main_score
    rows = [row for rows in result.scores.values() for row in rows]
    if any(metric not in row for row in rows):
        raise UserError(f"task {task.metadata.name} has no metric {metric!r}; it has {', '.join(rows[0])}")
    return EmbeddingTask(
        task=task.metadata.name,
        type=task.metadata.type,
        metric=metric,
        value=fmean(float(row[metric]) for row in rows),
        scores={split: list(map(_plain, rows)) for split, rows in result.scores.items()},
    )


def _plain(row: Any) -> Any:
    """Numbers, texts, lists and mappings of them, without numpy's types."""
    if isinstance(row, dict):
        return {key: _plain(value) for key, value in row.items()}
    if isinstance(row, list | tuple):
        return [_plain(value) for value in row]
    return row.item() if hasattr(row, "item") else row
