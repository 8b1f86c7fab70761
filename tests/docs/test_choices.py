"""docs/choices.md: every recipe line in its tables makes a configuration, and every row says yes, or why not."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from crossways.errors import UserError
from crossways.methods import Method, method_config
from crossways.models import CrosswaysConfig

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "choices.md"
LINE = re.compile(r"`(\w+: [^`]+)`")
TABLES = {"Megatron-core": 30, "LibMoE": 30}
"""Each table and about how many rows it has at least."""


def rows(title):
    """The cells of the table under a heading, without its head."""
    section = DOC.read_text(encoding="utf-8").split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def model_of(cell):
    """What the recipe lines of a cell say under `model:`."""
    lines = LINE.findall(cell)
    model = yaml.safe_load("\n".join(lines)) or {}
    assert len(model) == len(lines), f"a field twice in {cell}"
    return model


def configured(model):
    """The reference model with these fields; transformers itself would take unknown ones in silence."""
    unknown = set(model) - {field.name for field in dataclasses.fields(CrosswaysConfig)}
    assert not unknown, f"no such fields: {unknown}"
    return method_config(Method(title="row", paper="2026", equation="table", model=model))


ROWS = [pytest.param(row, id=f"{title}: {row[0]}") for title in TABLES for row in rows(title)]


@pytest.mark.parametrize("row", ROWS)
def test_a_row_makes_a_configuration_or_says_why_not(row):
    assert len(row) == 4
    here = row[-1]
    model = model_of(here)
    assert model or re.match(r"(no|always), [\w`]", here), here
    config = configured(model)
    for field, value in model.items():
        kept = getattr(config, field)
        assert kept == ({"name": value} if isinstance(value, str) and isinstance(kept, dict) else value)


@pytest.mark.parametrize("title", TABLES)
def test_the_tables_are_whole_and_name_a_choice_once(title):
    names = [row[0] for row in rows(title)]
    assert len(names) >= TABLES[title]
    assert len(set(names)) == len(names)


def test_a_line_that_says_nothing_known_would_be_found():
    with pytest.raises(UserError, match="unknown selection"):
        configured(model_of("`select: {name: quantile, k: 2}`"))
    with pytest.raises(AssertionError, match="router_jiter"):
        configured(model_of("`router_jiter: 0.01`"))


def test_the_page_names_its_sources_and_is_linked():
    text = DOC.read_text(encoding="utf-8")
    assert len(re.findall(r"`[0-9a-f]{40}`", text)) == 2
    for page in ("README.md", "docs/map.md"):
        assert "docs/choices.md" in (ROOT / page).read_text(encoding="utf-8")
