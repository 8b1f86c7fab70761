"""Instructions and answers: from Python's own library, files in Alpaca's form, or the hub."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from crossways.errors import UserError
from crossways.finetune.settings import ExampleSettings
from crossways.training import sources

PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
PROMPT_WITH_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
DOCSTRING_TASK = "Write the docstring of this Python function."


@dataclass(frozen=True)
class Example:
    """One instruction and its answer."""

    prompt: str
    """What the model reads; never scored."""
    completion: str
    """What it should answer."""


@dataclass(frozen=True)
class Examples:
    """A split."""

    train: tuple[Example, ...]
    validation: tuple[Example, ...]


def load_examples(settings: ExampleSettings) -> Examples:
    """Find the examples and split them; equal settings give an equal split. Repeated examples count once.

    Raises:
        UserError: a source that is not there, misses a field, or is too small to split.
    """
    found = list(dict.fromkeys(_source(settings)))
    order = np.random.default_rng(settings.split_seed).permutation(len(found))[: settings.max_examples]
    kept = [found[index] for index in order]
    if len(kept) < 2:
        raise UserError(f"examples {settings.source}: found {len(kept)} different examples, need at least 2 to split")
    held_out = min(max(1, round(settings.validation_fraction * len(kept))), len(kept) - 1)
    return Examples(train=tuple(kept[held_out:]), validation=tuple(kept[:held_out]))


def _source(settings: ExampleSettings) -> Iterator[Example]:
    if settings.source == "stdlib-docstrings":
        for path in sources.stdlib_files():
            yield from docstring_examples(path.read_text(encoding="utf-8", errors="replace"))
        return
    for row in _rows(settings.source):
        yield _alpaca(row, settings.source)


def _rows(source: str) -> Any:
    if not sources.is_local(source):
        return sources.load_hub_table(source, split="train")
    files = sources.local_files(source)
    data_files = [str(file.resolve()) for file in files]
    return sources.load_table(sources.file_format(files, source), source, data_files=data_files, split="train")


def _alpaca(row: dict[str, Any], source: str) -> Example:
    missing = [name for name in ("instruction", "output") if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(f"examples {source}: a row has no text under {missing}; its fields are {sorted(row)}")
    template = PROMPT_WITH_INPUT if row.get("input") else PROMPT
    return Example(template.format(instruction=row["instruction"], input=row.get("input")), row["output"])


def docstring_examples(source: str, longest: int = 1200) -> Iterator[Example]:
    """Functions with a docstring of a Python source: without it as the instruction, the docstring as the answer.

    Args:
        source: Python source; one that does not parse gives nothing.
        longest: most characters of a function; longer ones are left out.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node)
        if not docstring or len(docstring) < 20:
            continue
        node.body = node.body[1:]
        code = ast.unparse(node)
        if len(code) + len(docstring) <= longest:
            yield Example(PROMPT_WITH_INPUT.format(instruction=DOCSTRING_TASK, input=code), docstring)
