"""`run_study`: variants x seeds, resumable at any point."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from crossways.errors import UserError
from crossways.study.atomic import write_text_atomic
from crossways.study.execute import load_text, write_settings
from crossways.study.lock import locked
from crossways.study.plan import Run, changed_keys, plan_runs
from crossways.study.publish import StudyResult, finished_runs, publish, recipe_text
from crossways.study.recipe import Recipe, require_variant
from crossways.study.resolve import ResolvedVariant, resolve
from crossways.study.workers import Outcome, run_all
from crossways.training.corpus import Corpus, load_corpus
from crossways.training.packing import training_windows


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

    Each run has a folder `VARIANT/seed-S` in `out` with `settings.json`, `trainer/` (tracker logs, checkpoints),
    `log.txt` (what a worker printed), `model/` and `record.json`. Finished runs are never repeated, interrupted ones
    go on from their newest checkpoint.

    Args:
        recipe: the study.
        out: its folder.
        only: variants to run; default all.
        seeds: seeds to run instead of the recipe's.
        force: delete and repeat runs that were made with other settings.
        console: where progress and the table go; default standard output.

    Raises:
        UserError: an impossible recipe or corpus; runs in `out` that were made with other settings; another study at
            work in `out`; and, after all other runs, runs that failed for a reason the user can mend.
        Exception: after all other runs, the first unexpected error of a run.
    """
    console = console or Console()
    variants = resolve(recipe)
    for name in only or ():
        require_user_variant(name, recipe)
    chosen = {name: variant for name, variant in variants.items() if not only or name in only}
    with locked(out):
        corpus = load_corpus(recipe.corpus, recipe.split_seed)
        _compare(recipe, variants, corpus, out, force)
        runs = plan_runs(recipe, chosen, seeds or recipe.seeds, corpus.fingerprint, out)
        left = [run for run in runs if not run.record_path.exists()]
        outcomes = _run(recipe, left, corpus, out, console)
        result = publish(out, recipe, console) if finished_runs(recipe, out) else StudyResult((), None)
    _raise_failures([outcome for outcome in outcomes if outcome.error is not None], len(runs))
    return result


def require_user_variant(name: str, recipe: Recipe) -> None:
    """Raise `UserError` when the recipe has no variant of this name."""
    try:
        require_variant(name, recipe.variants, "the command line")
    except ValueError as error:
        raise UserError(str(error)) from error


def _compare(recipe: Recipe, variants: dict[str, ResolvedVariant], corpus: Corpus, out: Path, force: bool) -> None:
    """Hold everything the folder has of the recipe's variants against the recipe, whatever is asked for now."""
    present = {f.name.removeprefix("seed-") for f in out.glob("*/seed-*")}
    seeds = sorted(int(name) for name in present if name.isdigit())
    known = plan_runs(recipe, variants, seeds, corpus.fingerprint, out)
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


def _run(recipe: Recipe, runs: Sequence[Run], corpus: Corpus, out: Path, console: Console) -> list[Outcome]:
    if not runs:
        return []
    cache = out / "cache"
    _prepare_text(runs, corpus, cache)
    write_text_atomic(out / "recipe.yaml", recipe_text(recipe))
    for run in runs:
        write_settings(run)
    workers = min(recipe.workers, len(runs))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    outcomes = []
    # With one worker the trainer's own bar is shown, and two bars would fight for the line.
    with Progress(*columns, console=console, disable=workers == 1) as bar:
        task = bar.add_task("runs", total=len(runs))
        for outcome in run_all(runs, cache, workers=workers, threads=recipe.threads, progress=console.is_terminal):
            outcomes.append(outcome)
            bar.advance(task)
            console.print(_line(outcome, len(outcomes), len(runs)), highlight=False, soft_wrap=True)
    return outcomes


def _prepare_text(runs: Sequence[Run], corpus: Corpus, cache: Path) -> None:
    """Train the tokenizer and tokenise once, before workers would race for it; a corpus too short ends here."""
    tokenizer = load_text(runs[0], cache, corpus)[1]
    for length in sorted({run.settings["training"]["sequence_length"] for run in runs}):
        training_windows(corpus, tokenizer, length, 0, cache)


def _line(outcome: Outcome, done: int, total: int) -> str:
    head = f"[{done}/{total}] {outcome.run.name}: "
    if outcome.record is None:
        return escape(f"{head}failed: {one_line(outcome.error)}")
    evaluation = outcome.record.evaluation
    bits = evaluation.honest_bits_per_byte or evaluation.bits_per_byte
    return escape(f"{head}{bits:.3f} bits per byte, trained in {outcome.record.training.wall_seconds:.0f} s")


def one_line(error: BaseException | None) -> str:
    """An exception on one line; with its type unless it is meant for users."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _raise_failures(failed: Sequence[Outcome], total: int) -> None:
    """End with the failures: an unexpected one as it is, those a user can mend as one line."""
    for outcome in failed:
        if outcome.error is not None and not isinstance(outcome.error, UserError):
            outcome.error.add_note(f"in run {outcome.run.name}; the other runs are kept")
            raise outcome.error
    if failed:
        reasons: dict[str, str] = {}
        for outcome in failed:
            reasons.setdefault(one_line(outcome.error), outcome.run.name)
        shown = "; ".join(f"{name}: {reason}" for reason, name in reasons.items())
        raise UserError(f"{len(failed)} of {total} runs failed and left no record: {shown}")
