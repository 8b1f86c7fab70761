"""Read a recipe: find it by name or path, parse the YAML, apply overrides, validate."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from crossways.errors import UserError
from crossways.rules.registry import nearest
from crossways.study.problems import user_error
from crossways.study.recipe import Recipe

M = TypeVar("M", bound=BaseModel)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-3 as a number and refuses a key given twice, of which the first would be lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As in PyYAML; raises on a repeated key."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(  # YAML 1.1 wants a dot and a signed exponent, which nobody writes
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def shipped_recipes() -> dict[str, Traversable]:
    """The recipes inside the package, by name."""
    found = (files("crossways") / "recipes").iterdir()
    return {f.name.removesuffix(".yaml"): f for f in sorted(found, key=lambda f: f.name) if f.name.endswith(".yaml")}


def find_recipe(name: str) -> tuple[str, str]:
    """The short name and the text of a recipe, given by path or by the name of a shipped one.

    Raises:
        UserError: no such recipe (names the nearest), or a file that cannot be read.
    """
    path, shipped = Path(name), shipped_recipes()
    if name in shipped and not path.is_file():
        return name, shipped[name].read_text(encoding="utf-8")
    if not path.is_file():
        raise UserError(
            f"no recipe {name!r}{nearest(name, list(shipped))}; shipped: {', '.join(shipped)}; or give a YAML file"
        )
    try:
        return path.stem, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read recipe {name}: {error}") from error


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """A validated recipe.

    Args:
        name: a path, or the name of a shipped recipe.
        overrides: `dotted.key=value` strings, the value in YAML, applied in order.

    Raises:
        UserError: one line that names the key, for anything wrong in the recipe or an override.
    """
    _, text = find_recipe(name)
    return validated(Recipe, apply_overrides(parse_yaml(text, f"recipe {name}"), overrides), f"recipe {name}")


def validated(settings: type[M], raw: object, source: str) -> M:
    """`raw` as `settings`; raises `UserError` with one line about the first fault."""
    try:
        return settings.model_validate(raw)
    except ValidationError as error:
        raise user_error(error, settings, raw, source) from error


def parse_yaml(text: str, source: str) -> dict[str, Any]:
    """The mapping in a YAML text; raises `UserError` with the line of a syntax error."""
    try:
        raw = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise UserError(f"{source}, line {line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{source}: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{source}: expected a mapping of keys to values, found {type(raw).__name__}")
    return raw


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`raw` with `dotted.key=value` overrides applied in place; unknown keys are left to the validation."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {override!r}: expected dotted.key=value, such as training.max_steps=100")
        value = _parse_value(override, text)
        *parents, last = key.strip().split(".")
        target: Any = raw
        for depth, part in enumerate(parents):
            target = _step_into(target, part, parents[: depth + 1])
        if isinstance(target, list):
            target[_index(target, last, [*parents, last])] = value
        else:
            target[last] = value
    return raw


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override!r}: the value is not valid YAML") from error


def _step_into(target: Any, part: str, path: Sequence[str]) -> Any:
    key = ".".join(path)
    if isinstance(target, list):
        inner = target[_index(target, part, path)]
    else:
        if len(path) == 2 and path[0] == "variants" and part not in target:
            raise UserError(f"--set: unknown key {key!r}{nearest(part, list(target))}; variants: {', '.join(target)}")
        inner = target.setdefault(part, {})
        if inner is None:
            inner = target[part] = {}
    if not isinstance(inner, dict | list):
        raise UserError(f"--set: {key} is {inner!r}, which has no keys; set it as a whole")
    return inner


def _index(target: list[Any], part: str, path: Sequence[str]) -> int:
    if not part.isdigit() or int(part) >= len(target):
        raise UserError(f"--set: {'.'.join(path)}: expected an index from 0 to {len(target) - 1}")
    return int(part)
