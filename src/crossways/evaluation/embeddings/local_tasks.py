"""mteb tasks from JSON files of your own. Imports mteb: import this file only where that is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskSTS,
)
from mteb.abstasks.task_metadata import TaskMetadata
from pydantic import Field

from crossways.errors import UserError
from crossways.settings import Settings

TaskKind = Literal["STS", "PairClassification", "Classification", "Clustering"]
Rows = list[dict[str, Any]]


class LocalTask(Settings):
    """What a task file says."""

    name: str
    """How results call it."""
    type: TaskKind
    """`STS` (rows of sentence1, sentence2, score), `PairClassification` (sentence1, sentence2, label: 1 for a pair),
    `Classification` and `Clustering` (text, label)."""
    data: Path
    """JSON (a list of objects) or JSON lines, relative to the task file."""
    train: Path | None = None
    """Likewise, what the classifier of a `Classification` is trained on."""
    instruction: str | None = None
    """What the task asks for, in a sentence."""
    max_score: int = Field(default=5, ge=1)
    """Greatest score of an `STS`; the least is 0."""
    samples_per_label: int = Field(default=8, ge=1)
    """Training texts of each label in each of the ten experiments of a `Classification`."""


def build_task(task: LocalTask, folder: Path) -> AbsTask:
    """The task for `mteb.evaluate`; its files are read here, not later.

    Raises:
        UserError: a file that is missing or no JSON, or a row without what the type needs.
    """
    base, main_score, attributes = _parts(task)
    columns = {"STS": ("sentence1", "sentence2", "score"), "PairClassification": ("sentence1", "sentence2", "label")}
    wanted = columns.get(task.type, ("text", "label"))
    splits = {"test": read_rows(folder / task.data, wanted)}
    if task.type == "Classification":
        if task.train is None:
            raise UserError(f"task {task.name}: a Classification needs `train`, what its classifier learns from")
        splits["train"] = read_rows(folder / task.train, wanted)
    dataset = DatasetDict({split: _dataset(task.type, rows) for split, rows in splits.items()})

    def load_data(self: AbsTask, num_proc: int | None = None, **kwargs: Any) -> None:
        self.dataset = dataset
        self.data_loaded = True

    metadata = TaskMetadata(
        name=task.name,
        type=task.type,
        description="A local task.",
        dataset={"path": "local", "revision": "local"},
        prompt=task.instruction,
        eval_langs=["eng-Latn"],
        main_score=main_score,
        category="t2c" if task.type in ("Classification", "Clustering") else "t2t",
    )
    kind: Any = type(f"Local{task.type}", (base,), {"metadata": metadata, "load_data": load_data} | attributes)
    return kind()


def _parts(task: LocalTask) -> tuple[type[AbsTask], str, dict[str, Any]]:
    """mteb's class, its main score and what is set on it."""
    if task.type == "STS":
        return AbsTaskSTS, "cosine_spearman", {"min_score": 0, "max_score": task.max_score}
    if task.type == "PairClassification":
        return AbsTaskPairClassification, "max_ap", {}
    if task.type == "Classification":
        return AbsTaskClassification, "accuracy", {"samples_per_label": task.samples_per_label}
    return AbsTaskClusteringLegacy, "v_measure", {}


def _dataset(kind: TaskKind, rows: Rows) -> Dataset:
    """Rows in the form in which mteb's class of task wants them."""
    if kind == "Clustering":
        columns = {"sentences": [[row["text"] for row in rows]], "labels": [[row["label"] for row in rows]]}
        return Dataset.from_dict(columns)
    if kind == "PairClassification":
        rows = [{**row, "labels": row["label"]} for row in rows]
    return Dataset.from_list(rows)


def read_rows(path: Path, columns: tuple[str, ...]) -> Rows:
    """The objects of a JSON or JSON-lines file, each with these columns and no others."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(row) for row in text.splitlines() if row]
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is neither JSON nor JSON lines: {error}") from error
    for number, row in enumerate(rows, start=1):
        missing = [column for column in columns if not isinstance(row, dict) or column not in row]
        if missing:
            raise UserError(f"{path}, row {number}: no {', '.join(missing)}; every row needs {', '.join(columns)}")
    if not rows:
        raise UserError(f"{path} holds no rows")
    return [{column: row[column] for column in columns} for row in rows]
