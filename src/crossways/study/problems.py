"""From a pydantic error to the one line a user reads: the dotted key, the value and what is accepted."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from crossways.errors import UserError


def user_error(error: ValidationError, settings: type[BaseModel], raw: object, source: str) -> UserError:
    """The first fault of `raw`, which was to become `settings`, unknown keys before wrong values.

    Args:
        error: what pydantic raised.
        settings: the class validated against, which knows the keys.
        raw: the value that was validated.
        source: where it came from, such as a file name.
    """
    faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    return UserError(f"{source}: {_describe(fault, settings, raw)}")


def _describe(fault: ErrorDetails, settings: type[BaseModel], raw: object) -> str:
    path, value = _follow(fault["loc"], raw)
    key = ".".join(map(str, path))
    if fault["type"] == "extra_forbidden":
        return unknown_key([str(part) for part in path], settings)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "missing":
        return f"key {'.'.join(map(str, fault['loc']))!r} is missing"
    if fault["type"] == "value_error" and isinstance(value, Mapping):
        return message
    if isinstance(value, Mapping | list | tuple) and fault["type"] not in ("too_short", "value_error"):
        value = "..." if len(str(value)) > 60 else value
    return f"{key or 'the recipe'} = {value!r} is not accepted: {message[:1].lower() + message[1:]}"


def _follow(loc: Sequence[str | int], raw: object) -> tuple[list[str | int], object]:
    """The part of `loc` that exists in `raw` (pydantic appends names of union members), and what stands there."""
    path: list[str | int] = []
    for part in loc:
        try:
            raw = raw[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            break
        path.append(part)
    return path, raw


def unknown_key(path: Sequence[str], settings: type[BaseModel]) -> str:
    """The message for a key that does not exist; names the nearest one beside it, or elsewhere if much nearer."""
    *parents, key = path
    prefix = ".".join(parents) + "." if parents else ""
    siblings = [prefix + name for name in _fields_at(settings, parents)]
    scored = [(_similarity(key, name.rpartition(".")[2]), name) for name in siblings]
    best = max(scored, default=(0.0, ""))
    others = [(_similarity(key, name.rpartition(".")[2]), name) for name in dotted_keys(settings)]
    elsewhere = max(others, key=lambda other: (other[0], -other[1].count(".")))
    nearest = elsewhere if best[0] < 0.6 and elsewhere[0] > 0.8 else best
    return f"unknown key {prefix + key!r}; the nearest known key is {nearest[1]!r}"


def dotted_keys(settings: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys below a settings class; names a user chooses stand as `*`."""
    keys = []
    for name, info in settings.model_fields.items():
        keys.append(prefix + name)
        inner = _inner(info.annotation)
        if inner is not None:
            star = "*." if typing.get_origin(info.annotation) in (dict, tuple, list) else ""
            keys += dotted_keys(inner, f"{prefix}{name}.{star}")
    return keys


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _inner(annotation: Any) -> type[BaseModel] | None:
    """The settings class in an annotation such as `X`, `X | None`, `dict[str, X]` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for arg in typing.get_args(annotation) if (found := _inner(arg))), None)


def _fields_at(settings: type[BaseModel], path: Sequence[str]) -> list[str]:
    current: type[BaseModel] | None = settings
    skip = False  # the next part is a name the user chose, or an index
    for part in path:
        if skip or current is None:
            skip = False
            continue
        info = current.model_fields.get(part)
        current = _inner(info.annotation) if info else None
        skip = info is not None and typing.get_origin(info.annotation) in (dict, tuple, list)
    return list(current.model_fields) if current else []
