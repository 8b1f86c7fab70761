"""Every rule x data x seed of a fine-tuning recipe, resumable, and the table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from crossways.errors import UserError
from crossways.finetune.corruption import corrupted
from crossways.finetune.examples import load_examples
from crossways.finetune.run import FinetuneRecord, finetune_one, run_settings, write_record
from crossways.finetune.settings import FinetuneRecipe
from crossways.study.atomic import write_text_atomic
from crossways.study.spread import Spread, fixed

COLUMNS = (
    "rule",
    "trained on",
    "clean, before",
    "train",
    "clean",
    "corrupted",
    "clean, causal",
    "corrupted, causal",
    "experts per token",
)


def run_grid(
    recipe: FinetuneRecipe, out: Path, *, only: Sequence[str] | None = None, console: Console | None = None
) -> list[FinetuneRecord]:
    """Fine-tune everything that is not finished yet, then write `table.md` and print it.

    Args:
        recipe: what to run.
        out: folder for everything; a finished run in it is not repeated.
        only: names of rules, default all.
        console: where the table goes.

    Raises:
        UserError: unknown names, or a finished run in `out` that was made with other settings.
    """
    console = console or Console()
    unknown = set(only or ()) - set(recipe.rules)
    if unknown:
        raise UserError(f"the recipe has no rule {sorted(unknown)}; it has {sorted(recipe.rules)}")
    records = []
    for rule, trained_on, seed in _runs(recipe, only):
        folder = out / rule / trained_on / f"seed-{seed}"
        record = finished(folder, run_settings(recipe, rule, trained_on, seed))
        if record is None:
            console.print(f"{rule}, {trained_on}, seed {seed}", highlight=False)
            record = _run(recipe, rule, trained_on, seed, folder, progress=console.is_terminal)
            write_record(record, folder)
        records.append(record)
    rows = table_rows(records)
    write_text_atomic(out / "table.md", markdown(recipe, rows))
    console.print(_table(recipe, rows))
    console.print(f"written to {out}", highlight=False, soft_wrap=True, markup=False)
    return records


def finished(folder: Path, settings: dict[str, object]) -> FinetuneRecord | None:
    """The record of a finished run, None if there is none."""
    path = folder / "record.json"
    if not path.is_file():
        return None
    record = FinetuneRecord.model_validate(json.loads(path.read_text(encoding="utf-8")))
    if record.settings != settings:
        changed = sorted(key for key in settings if record.settings.get(key) != settings[key])
        raise UserError(f"{folder} was made with other settings ({', '.join(changed)}); choose another --out")
    return record


def _runs(recipe: FinetuneRecipe, only: Sequence[str] | None) -> Iterator[tuple[str, str, int]]:
    for rule in recipe.rules:
        if only and rule not in only:
            continue
        for trained_on in recipe.train_on:
            for seed in recipe.seeds:
                yield rule, trained_on, seed


def _run(
    recipe: FinetuneRecipe, rule: str, trained_on: str, seed: int, folder: Path, *, progress: bool
) -> FinetuneRecord:
    examples = load_examples(recipe.examples)
    train = examples.train if trained_on == "clean" else corrupted(examples.train, recipe.corruption, "train")
    data = {
        "train": train,
        "clean": examples.validation,
        "corrupted": corrupted(examples.validation, recipe.corruption, "validation"),
    }
    return finetune_one(recipe, rule, trained_on, seed, data, folder, progress=progress)


def table_rows(records: Sequence[FinetuneRecord]) -> list[tuple[str, ...]]:
    """One row per rule and data, in the order of the records: mean over seeds, spread where there are several.
    Perplexities of leaky rules are marked."""
    groups: dict[tuple[str, str], list[FinetuneRecord]] = {}
    for record in records:
        groups.setdefault((record.rule, record.trained_on), []).append(record)
    return [(*name, *_figures(group)) for name, group in groups.items()]


def _figures(group: Sequence[FinetuneRecord]) -> Iterator[str]:
    mark = " (leaky)" if group[0].leaky else ""
    yield _mean([r.before["clean"].perplexity for r in group]) + mark
    for name in ("train", "clean", "corrupted"):
        yield _mean([r.after[name].perplexity for r in group]) + mark
    for name in ("clean", "corrupted"):
        yield _mean([r.after[name].causal_perplexity for r in group])
    yield _mean([r.after["clean"].experts_per_token for r in group])


def _mean(values: Sequence[float | None]) -> str:
    known = tuple(value for value in values if value is not None)
    if len(known) < len(values):
        return ""
    mean, spread = Spread(known).describe(fixed(3))
    return mean if len(known) == 1 else f"{mean} {spread}"


def markdown(recipe: FinetuneRecipe, rows: Sequence[tuple[str, ...]]) -> str:
    """The table with what was done."""
    corruption = recipe.corruption
    head = (
        f"# {recipe.title}\n\n{recipe.model}, {recipe.tuning.max_steps} steps of {recipe.tuning.batch_size} "
        f"examples, {'all weights' if recipe.lora is None else f'LoRA of rank {recipe.lora.r}'}; corruption: "
        f"{corruption.kind} at rate {corruption.rate:g}. Perplexity per token of answers; *leaky*: a token's experts "
        "depend on later tokens or other rows, beside it the causal decode twin's.\n\n"
    )
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return head + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _table(recipe: FinetuneRecipe, rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(*(Column(name, overflow="fold") for name in COLUMNS), title=recipe.title)  # figures stay whole
    for row in rows:
        table.add_row(*row)
    return table
