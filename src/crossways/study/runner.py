"""`run_study`: variants x seeds, resumable at any point, and the table and page over what is finished."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crossways.errors import UserError
from crossways.report import render_report
from crossways.study.atomic import write_text_atomic
from crossways.study.execute import load_text, write_settings
from crossways.study.plan import Run, changed_keys, plan_runs
from crossways.study.recipe import Recipe, require_variant
from crossways.study.record import RunRecord
from crossways.study.resolve import ResolvedVariant, resolve
from crossways.study.table import summarize, to_csv, to_markdown, to_rich
from crossways.study.workers import Outcome, run_all
from crossways.training.corpus import load_corpus


@dataclass(frozen=True)
class StudyResult:
    """What `run_study` leaves behind."""

    records: tuple[RunRecord, ...]
    """All finished runs of the recipe in the folder, variant by variant."""
    report: Path | None
    """The page; None when no run is finished."""


def run_study(
    recipe: Recipe,
    out: Path,
    *,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    force: bool = False,
    console: Console | None = None,
) -> StudyResult:
    """Do what is left to do of a study, then write `table.md`, `table.csv` and `report.html`.

    Each run has a folder `VARIANT/seed-S` in `out` with `settings.json`, `trainer/` (logs, checkpoints), `model/` and
    `record.json`. Finished runs are never repeated, interrupted ones go on from their newest checkpoint.

    Args:
        recipe: the study.
        out: its folder.
        only: variants to run; default all.
        seeds: seeds to run instead of the recipe's.
        force: delete and repeat runs that were made with other settings.
        console: where progress and the table go; default standard output.

    Raises:
        UserError: an impossible recipe; runs in `out` that were made with other settings; another study at work in
            `out`; and, after all other runs, runs that failed for a reason the user can mend.
        Exception: after all other runs, the first unexpected error of a run.
    """
    console = console or Console()
    variants = resolve(recipe)
    for name in only or ():
        require_user_variant(name, recipe)
    chosen = {name: variant for name, variant in variants.items() if not only or name in only}
    with _locked(out):
        runs = _prepare(recipe, variants, chosen, seeds or recipe.seeds, out, force)
        outcomes = _run(recipe, [run for run in runs if not run.record_path.exists()], out, console)
        result = report_study(out, recipe, console) if _records(recipe, out) else StudyResult((), None)
    _raise_failures([outcome for outcome in outcomes if outcome.error is not None], len(runs))
    return result


def require_user_variant(name: str, recipe: Recipe) -> None:
    """Raise `UserError` when the recipe has no variant of this name."""
    try:
        require_variant(name, recipe.variants, "the command line")
    except ValueError as error:
        raise UserError(str(error)) from error


def report_study(out: Path, recipe: Recipe | None = None, console: Console | None = None) -> StudyResult:
    """Write table and page again from the records in a study's folder, and print the table.

    Args:
        out: the folder.
        recipe: the study; default the one kept in the folder.
        console: where to print; default standard output.

    Raises:
        UserError: no study there, or none of its runs is finished.
    """
    console = console or Console()
    recipe = recipe or kept_recipe(out)
    records = _records(recipe, out)
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
    console.print(to_rich(rows, title=recipe.title))
    console.print(f"report: {page}", highlight=False, soft_wrap=True, markup=False)
    return StudyResult(tuple(records), page)


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
    from crossways.study.load import load_recipe

    path = out / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{out} is not the folder of a study: it has no recipe.yaml")
    return load_recipe(str(path))


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep a second study out of the folder; the system frees the lock of a process that died."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from error
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"another study is at work in {out}; wait for it or use another --out") from error


def _prepare(
    recipe: Recipe,
    variants: dict[str, ResolvedVariant],
    chosen: dict[str, ResolvedVariant],
    seeds: Sequence[int],
    out: Path,
    force: bool,
) -> list[Run]:
    """The runs asked for, after checking all that the folder holds of this recipe against it."""
    digest = load_corpus(recipe.corpus, recipe.split_seed).fingerprint
    present = sorted({int(f.name.removeprefix("seed-")) for f in out.glob("*/seed-*") if f.name[5:].isdigit()})
    known = plan_runs(recipe, variants, present, digest, out)
    changes = {run.folder: keys for run in known if (keys := changed_keys(run))}
    if changes and not force:
        folder, keys = next(iter(changes.items()))
        shown = "; ".join(keys[:4]) + (f"; and {len(keys) - 4} more" if len(keys) > 4 else "")
        raise UserError(
            f"{len(changes)} run(s) in {out} were made with other settings ({folder.relative_to(out)}: {shown}); use "
            "another --out, or --force to delete and repeat them"
        )
    for folder in changes:
        shutil.rmtree(folder)
    runs = plan_runs(recipe, chosen, seeds, digest, out)
    write_text_atomic(out / "recipe.yaml", recipe_text(recipe))
    return runs


def _run(recipe: Recipe, runs: Sequence[Run], out: Path, console: Console) -> list[Outcome]:
    if not runs:
        return []
    cache = out / "cache"
    load_text(runs[0], cache)  # trains the tokenizer once, before workers would race for it
    for run in runs:
        write_settings(run)
    workers = min(recipe.workers, len(runs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    with Progress(*columns, console=console, disable=workers == 1) as bar:
        task = bar.add_task("runs", total=len(runs))
        for outcome in run_all(runs, cache, workers=workers, threads=recipe.threads, progress=console.is_terminal):
            outcomes.append(outcome)
            bar.advance(task)
            bar.console.print(_line(outcome, len(outcomes), len(runs)), highlight=False, soft_wrap=True)
    return outcomes


def _line(outcome: Outcome, done: int, total: int) -> str:
    head = f"[{done}/{total}] {outcome.run.name}: "
    if outcome.record is None:
        return escape(f"{head}failed: {one_line(outcome.error)}")
    evaluation = outcome.record.evaluation
    bits = evaluation.honest_bits_per_byte or evaluation.bits_per_byte
    return escape(f"{head}{bits:.3f} bits per byte, {outcome.record.training.wall_seconds:.0f} s")


def one_line(error: BaseException | None) -> str:
    """An exception on one line; its type too unless it is meant for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _raise_failures(failed: Sequence[Outcome], total: int) -> None:
    """End with the failures: an unexpected one as it is, those a user can mend as one line."""
    for outcome in failed:
        if outcome.error is not None and not isinstance(outcome.error, UserError):
            outcome.error.add_note(f"in run {outcome.run.name}; the other runs are kept")
            raise outcome.error
    if failed:
        reasons = {one_line(outcome.error): outcome.run.name for outcome in failed}
        shown = "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
        raise UserError(f"{len(failed)} of {total} runs failed and left no record: {shown}")


def _records(recipe: Recipe, out: Path) -> list[RunRecord]:
    """The finished runs of the recipe's variants, in the recipe's order, seeds ascending."""
    found = []
    for name in recipe.variants:
        records = [RunRecord.load(path) for path in (out / name).glob("seed-*/record.json")]
        found += sorted(records, key=lambda record: record.seed)
    return found
