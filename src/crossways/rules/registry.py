"""From plain JSON to rules and back: `{"name": "top_k", "k": 2}` is `TopK(k=2)`.

A rule is found by its `name` among the subclasses of its kind, so a new rule needs no entry in any list: a file in
the kind's package is enough, and a class defined anywhere else counts once its module is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from crossways.errors import UserError

R = TypeVar("R")


def nearest(name: str, known: list[str]) -> str:
    """' (did you mean ...?)' for a misspelt name, or an empty string when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _subclasses(kind: type[R]) -> Iterator[type[R]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def catalogue(kind: type[R], package: str | None = None) -> dict[str, type[R]]:
    """All rules of a kind by name, after importing every module of the package they live in, if they have one."""
    if package is not None:
        for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
            importlib.import_module(f"{package}.{module.name}")
    return {cls.name: cls for cls in _subclasses(kind) if "name" in vars(cls)}  # type: ignore[attr-defined]


def build(kind: type[R], spec: str | Mapping[str, Any], known: Mapping[str, type[R]], what: str | None = None) -> R:
    """Build a rule from its name or from `{"name": ..., field: value, ...}`.

    Raises:
        UserError: for an unknown rule or field, naming the nearest known one, or a missing or wrong field.
    """
    what = what or kind.__name__.lower()
    if not isinstance(spec, str | Mapping):
        raise UserError(f"a {what} is a name or a mapping with a name, got {spec!r}")
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(fields.pop("name", None))
    if name not in known:
        hint = nearest(name, list(known))
        raise UserError(f"unknown {what} {name!r}{hint}; known: {', '.join(sorted(known))}")
    cls = known[name]
    accepted = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in fields:
        if key not in accepted:
            raise UserError(f"{what} {name!r} has no field {key!r}{nearest(key, accepted)}; it has: {accepted}")
    try:
        return cls(**fields)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} {name!r}: {error}; its fields are {accepted}") from error


def describe(rule: Any) -> str:
    """A rule on one line, such as `top_c(k=2.0, group='sequence')`."""
    fields = ", ".join(f"{f.name}={getattr(rule, f.name)!r}" for f in dataclasses.fields(rule))
    return f"{rule.name}({fields})"
