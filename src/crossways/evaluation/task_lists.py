"""Lists of downstream tasks: the papers' own, shipped as recipes, or a YAML file of yours."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from crossways.errors import UserError
from crossways.evaluation.embeddings.settings import EmbeddingSettings
from crossways.settings import Settings
from crossways.study.load import parse_yaml, validated

Tool = Literal["lm-eval", "mteb"]
TASK_FILES = (".yaml", ".yml", ".json")
"""Endings of task files and task lists."""


class ListedTask(Settings):
    """One task of a list."""

    task: str
    """Its name in the tool, or a task file relative to the list."""
    metric: str | None = None
    """The figure that the paper reports, such as acc, acc_norm or exact_match; None takes the tool's first."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Examples in the prompt; None is the task's own number, 0 where it names none. lm-eval only."""
    label: str = ""
    """What the paper calls it."""


class TaskList(Settings):
    """Tasks that are run together."""

    title: str
    """What the list is."""
    source: str = ""
    """The paper."""
    notes: str = ""
    """What is not known of the paper's protocol, and what is needed beside a network."""
    tool: Tool
    """Which library runs the tasks."""
    tasks: tuple[ListedTask, ...] = Field(min_length=1)
    """In the order of the table."""
    embedding: EmbeddingSettings = EmbeddingSettings()
    """The protocol of an mteb list, where it differs from the defaults."""


def shipped_lists(tool: Tool) -> dict[str, TaskList]:
    """The lists inside the package that a tool runs, by name."""
    lists = {name: read_list(file, name) for name, file in _list_files().items()}
    return {name: each for name, each in lists.items() if each.tool == tool}


def _list_files() -> dict[str, Traversable]:
    found = sorted((files("crossways") / "recipes" / "tasks").iterdir(), key=lambda file: file.name)
    return {file.name.removesuffix(".yaml"): file for file in found if file.name.endswith(".yaml")}


def read_list(file: Traversable | Path, name: str) -> TaskList:
    """A validated list."""
    source = f"task list {name}"
    return validated(TaskList, parse_yaml(file.read_text(encoding="utf-8"), source), source)


def find_tasks(names: str, tool: Tool) -> tuple[list[ListedTask], TaskList | None]:
    """What `--tasks` means: names, task files and lists, separated by commas; a list stands for its tasks.

    Returns:
        The tasks, files by absolute path, and the list if one was named.

    Raises:
        UserError: a list for the other tool, two lists, or nothing at all.
    """
    tasks: list[ListedTask] = []
    lists: list[TaskList] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        found = _as_list(name, tool)
        if found is None:
            tasks.append(ListedTask(task=str(Path(name).resolve()) if _is_file(name) else name))
        else:
            lists.append(found)
            tasks += found.tasks
    if not tasks:
        raise UserError(f"--tasks {names!r} names no task")
    if len(lists) > 1:
        raise UserError("give one task list at a time: each has a protocol of its own")
    return tasks, lists[0] if lists else None


def _as_list(name: str, tool: Tool) -> TaskList | None:
    """The list of this name or in this file; None if it is a task."""
    if _is_file(name):
        path = Path(name).resolve()
        raw = _mapping(path)
        if raw is None or "tasks" not in raw:
            return None
        found = validated(TaskList, raw, f"task list {name}")
        found = found.model_copy(update={"tasks": tuple(_located(task, path.parent) for task in found.tasks)})
    else:
        shipped = _list_files()
        if name not in shipped:
            return None
        found = read_list(shipped[name], name)
    if found.tool != tool:
        raise UserError(f"the tasks of {name} are for {found.tool}, not {tool}")
    return found


def _mapping(path: Path) -> dict[str, Any] | None:
    """The YAML in a file; None for a task file of lm-eval with tags that only lm-eval reads."""
    text = path.read_text(encoding="utf-8")
    return None if "!function" in text else parse_yaml(text, str(path))


def _located(task: ListedTask, folder: Path) -> ListedTask:
    path = folder / task.task
    return task.model_copy(update={"task": str(path)}) if _is_file(path) else task


def _is_file(name: str | Path) -> bool:
    return Path(name).suffix in TASK_FILES and Path(name).is_file()
