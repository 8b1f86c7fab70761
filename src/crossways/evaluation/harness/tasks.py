"""Find lm-eval's tasks, by name or in files. Imports lm-eval: import this file only where that is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from crossways.errors import UserError
from crossways.evaluation.task_lists import TASK_FILES, ListedTask
from crossways.rules.registry import nearest

FEWSHOT_SEED = 1234
"""lm-eval's own default."""


def load_tasks(listed: Sequence[ListedTask], num_fewshot: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Tasks as `lm_eval.evaluator.evaluate` takes them, and the name that each listed one has there.

    Args:
        listed: names of lm-eval's tasks and groups, or paths of task files.
        num_fewshot: examples in the prompt of tasks that do not say; None is the task's own, or 0.

    Raises:
        UserError: a task that does not exist, or whose data cannot be had.
    """
    manager = TaskManager(include_defaults=any(not _is_file(task.task) for task in listed))
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    names = []
    for entry in listed:
        loaded = _load(manager, entry.task)
        twice = set(loaded["tasks"]) & set(found["tasks"])
        if twice:
            raise UserError(f"{', '.join(sorted(twice))}: asked for twice")
        for task in loaded["tasks"].values():
            _configure(task, entry.num_fewshot if entry.num_fewshot is not None else num_fewshot)
        for key in found:
            found[key] |= loaded.get(key, {})
        names.append(next(iter(loaded["groups"] or loaded["tasks"])))
    return found, names


def _load(manager: TaskManager, name: str) -> Any:
    try:
        return manager.load([local_task(Path(name)) if _is_file(name) else name])
    except KeyError as error:
        raise UserError(f"lm-eval has no task {name!r}{nearest(name, manager.all_tasks)}") from error
    except (OSError, ValueError) as error:  # DatasetNotFoundError and offline mode are OSErrors
        raise UserError(f"task {name}: its data cannot be loaded: {error}") from error


def _configure(task: Any, num_fewshot: int | None) -> None:
    if num_fewshot is not None:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)


def local_task(path: Path) -> dict[str, Any]:
    """The configuration in a task file, data files made absolute: they are relative to the task file.

    Raises:
        UserError: a file that lm-eval cannot read, that names no task, or whose data are missing.
    """
    try:
        config = load_yaml(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read task file {path}: {error}") from error
    if "task" not in config:
        raise UserError(f"task file {path} has no key `task`, the task's name")
    arguments = dict(config.get("dataset_kwargs") or {})
    if "data_files" in arguments:
        arguments["data_files"] = _absolute(arguments["data_files"], path.parent)
        config["dataset_kwargs"] = arguments
    return config


def _absolute(data_files: Any, folder: Path) -> Any:
    if isinstance(data_files, Mapping):
        return {split: _absolute(each, folder) for split, each in data_files.items()}
    if isinstance(data_files, list):
        return [_absolute(each, folder) for each in data_files]
    if "://" in data_files:
        return data_files
    path = folder / data_files
    if not any(character in data_files for character in "*?[") and not path.is_file():
        raise UserError(f"{path} does not exist")
    return str(path)


def _is_file(name: str) -> bool:
    return Path(name).suffix in TASK_FILES
