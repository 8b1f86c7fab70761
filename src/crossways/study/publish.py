"""What a study's folder says once runs are finished: the table, the page, and the recipe they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console

from crossways.errors import UserError
from crossways.report import render_report
from crossways.study.atomic import write_text_atomic
from crossways.study.load import load_recipe
from crossways.study.recipe import Recipe
from crossways.study.record import RunRecord
from crossways.study.table import summarize, to_csv, to_markdown, to_rich


@dataclass(frozen=True)
class StudyResult:
    """What a study leaves behind."""

    records: tuple[RunRecord, ...]
    """All finished runs of the recipe in the folder, variant by variant."""
    report: Path | None
    """The page; None when no run is finished."""


def publish(out: Path, recipe: Recipe | None = None, console: Console | None = None) -> StudyResult:
    """Write `table.md`, `table.csv` and `report.html` from the records in a study's folder, and print the table.

    Args:
        out: the folder.
        recipe: the study; default the one kept in the folder.
        console: where to print; default standard output.

    Raises:
        UserError: no study there, or none of its runs is finished.
    """
    console = console or Console()
    recipe = recipe or kept_recipe(out)
    records = finished_runs(recipe, out)
    if not records:
        raise UserError(f"{out} has no finished run; start the study with `crossways study` first")
    rows = summarize(records)
    write_text_atomic(out / "table.md", f"# {recipe.title}\n\n{recipe.notice}\n\n{to_markdown(rows)}")
    write_text_atomic(out / "table.csv", to_csv(rows))
    page = render_report(
        records,
        title=recipe.title,
        description=recipe.description,
        notice=recipe.notice,
        comparisons=recipe.comparisons,
        recipe_text=recipe_text(recipe),
        corpus=recipe.corpus.source,
        out=out / "report.html",
    )
    console.print(to_rich(rows, title=recipe.title, width=console.width))
    console.print(f"report: {page}", highlight=False, soft_wrap=True, markup=False)
    return StudyResult(tuple(records), page)


def finished_runs(recipe: Recipe, out: Path) -> list[RunRecord]:
    """The records of the recipe's variants in a folder, in the recipe's order, seeds ascending."""
    found: list[RunRecord] = []
    for name in recipe.variants:
        records = [RunRecord.load(path) for path in (out / name).glob("seed-*/record.json")]
        found += sorted(records, key=lambda record: record.seed)
    return found


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML, with every default that was not written out."""
    dumped = recipe.model_dump(mode="json")
    dumped["model"] = recipe.model.model_dump(mode="json", exclude_unset=True)
    dumped["variants"] = {
        name: variant.model_dump(mode="json", exclude_unset=True) for name, variant in recipe.variants.items()
    }
    return yaml.safe_dump(dumped, sort_keys=False, allow_unicode=True, width=110)


def kept_recipe(out: Path) -> Recipe:
    """The recipe a study's folder was made with; raises `UserError` when there is none."""
    path = out / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{out} is not the folder of a study: it has no recipe.yaml")
    return load_recipe(str(path))
