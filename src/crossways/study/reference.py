"""The reference of recipe keys, made from the settings themselves so that it cannot fall behind."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from crossways.evaluation.settings import EvaluationSettings
from crossways.models.fields import RoutingFields
from crossways.study.recipe import MatchSettings, Recipe, Variant, VariantMatch
from crossways.study.record import Comparison
from crossways.training.corpus import CorpusSettings
from crossways.training.settings import TrainingSettings
from crossways.training.tokenizer import TokenizerSettings

SECTIONS: dict[str, type[BaseModel]] = {
    "The recipe": Recipe,
    "`corpus`": CorpusSettings,
    "`tokenizer`": TokenizerSettings,
    "`training`": TrainingSettings,
    "`evaluation`": EvaluationSettings,
    "`match`": MatchSettings,
    "`variants.NAME`": Variant,
    "`variants.NAME.match`": VariantMatch,
    "`comparisons`": Comparison,
}


def recipe_reference() -> str:
    """Markdown: a table per section of a recipe, a row per key with its default and what it does."""
    parts = [_table(title, _settings_rows(settings)) for title, settings in SECTIONS.items()]
    parts.append(_table("`model`", _model_rows(), note="And every field of transformers' `LlamaConfig`."))
    return "\n".join(parts)


def _table(title: str, rows: list[tuple[str, str, str]], note: str = "") -> str:
    head = [f"## {title}", "", *([note, ""] if note else []), "| key | default | what it does |", "|---|---|---|"]
    return "\n".join([*head, *(f"| `{key}` | {default} | {text} |" for key, default, text in rows), ""])


def _settings_rows(settings: type[BaseModel]) -> list[tuple[str, str, str]]:
    return [(name, _default(field), _line(field.description)) for name, field in settings.model_fields.items()]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "see below" if isinstance(value, BaseModel) else f"`{value!r}`"


def _model_rows() -> list[tuple[str, str, str]]:
    own = RoutingFields.__annotations__
    fields = {field.name: field for field in dataclasses.fields(RoutingFields)}  # type: ignore[arg-type]
    texts = _attribute_docstrings(RoutingFields)
    return [(name, f"`{fields[name].default!r}`", _line(texts[name])) for name in own if name in texts]


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """The string after each annotated field of a class, read from its source."""
    body: list[Any] = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: text.value.value
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(field.target, ast.Name)
        if isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def _line(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")
