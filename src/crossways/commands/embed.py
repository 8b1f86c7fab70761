"""`crossways embed`: tasks of mteb on the embeddings of a saved model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crossways.commands.options import (
    Budget,
    CalibrateOn,
    CalibrateTokens,
    Device,
    Dtype,
    ListTasks,
    ModelName,
    Preset,
    RecordFile,
)
from crossways.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from crossways.evaluation.embeddings.record import EmbeddingRecord
    from crossways.evaluation.embeddings.settings import EmbeddingSettings


def embed_command(
    model_name: ModelName = None,
    tasks: Annotated[
        str | None, typer.Option(help="mteb's names, task files (YAML), or a list (see --list), with commas.")
    ] = None,
    kind: Annotated[
        str | None, typer.Option(help="hs (hidden state, default), rw (routing weights), moee, moee-sum (both).")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="none (in quotes, default), prompteol, bare, or a template with {text}.")
    ] = None,
    rule: Preset = None,
    k: Budget = None,
    causal: Annotated[
        bool | None, typer.Option("--causal/--whole", help="Let decode twins decide, or the rule itself (default).")
    ] = None,
    calibrate_on: CalibrateOn = None,
    calibrate_tokens: CalibrateTokens = 100_000,
    fit_on: Annotated[
        Path | None, typer.Option(help="Text file, one text a line: standardise by its statistics.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other setting, e.g. standardise=batch, batch_size=64."),
    ] = None,
    dtype: Dtype = None,
    device: Device = None,
    out: RecordFile = None,
    list_tasks: ListTasks = False,
) -> None:
    """Embed texts with MODEL, which was never trained for it, and run tasks of mteb on the embeddings."""
    from rich.console import Console

    from crossways.commands.harness import print_lists
    from crossways.commands.terminal import no_bars_in_logs
    from crossways.extras import require

    console = Console()
    if list_tasks:
        print_lists(console, "mteb")
        return
    if model_name is None or tasks is None:
        raise UserError("give a MODEL and --tasks (or --list)")
    require("mteb", "sentence_transformers", extra="eval")
    from crossways.evaluation.embeddings.encoder import RoutedEncoder
    from crossways.evaluation.embeddings.run import evaluate_embeddings
    from crossways.evaluation.prepared import numbers, prepared
    from crossways.evaluation.task_lists import find_tasks
    from crossways.study.atomic import write_text_atomic

    no_bars_in_logs()
    listed, found = find_tasks(tasks, "mteb")
    asked: dict[str, Any] = {"kind": kind, "prompt": prompt, "causal": causal}
    asked["standardise"] = "fitted" if fit_on is not None else None
    settings = settings_of(found.embedding if found else None, asked, overrides or [])
    texts = read_lines(fit_on) if fit_on is not None else []
    model, tokenizer = prepared(
        model_name,
        rule=rule,
        k=numbers(k),
        calibrate_on=calibrate_on,
        calibrate_tokens=calibrate_tokens,
        dtype=dtype,
        device=device,
    )
    encoder = RoutedEncoder(model, tokenizer, settings)
    if texts:
        encoder.fit(texts)
    fitted_on = None if fit_on is None else str(fit_on)
    record = evaluate_embeddings(encoder, listed, name=model_name, fitted_on=fitted_on, progress=sys.stderr.isatty())
    console.print(figures_table(record))
    if out is not None:
        write_text_atomic(out, record.model_dump_json(indent=1) + "\n")
        console.print(f"written to {out}", highlight=False, soft_wrap=True, markup=False)


def settings_of(base: EmbeddingSettings | None, asked: dict[str, Any], overrides: list[str]) -> EmbeddingSettings:
    """A list's protocol or the defaults, with what was asked for in its place."""
    from crossways.evaluation.embeddings.settings import EmbeddingSettings
    from crossways.study.load import apply_overrides, validated

    raw = base.model_dump() if base is not None else {}
    raw |= {key: value for key, value in asked.items() if value is not None}
    return validated(EmbeddingSettings, apply_overrides(raw, overrides), "crossways embed")


def read_lines(path: Path) -> list[str]:
    """The texts of a file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    texts = [line for line in lines if line.strip()]
    if len(texts) < 2:
        raise UserError(f"--fit-on {path}: {len(texts)} texts; statistics need two or more, one a line")
    return texts


def figures_table(record: EmbeddingRecord) -> Table:
    """The headline figures, for a terminal."""
    from rich.table import Table

    settings, routing = record.settings, record.routing
    spent = "" if routing.experts_per_token is None else f"; {routing.experts_per_token:.4g} experts per token"
    caption = (
        f"{settings.kind}, prompt {settings.prompt}, standardise {settings.standardise}, width {record.width}; "
        f"{routing.rule}{f', by {routing.twin}' if routing.twin else ''}{spent}"
    )
    table = Table("task", "type", "metric", "value", title=record.model, caption=caption, caption_justify="left")
    for task in record.tasks:
        table.add_row(task.task, task.type, task.metric, f"{task.value:.4f}")
    for kind, value in record.mean_by_type.items():
        table.add_row("mean", kind, "", f"{value:.4f}")
    table.add_row("mean", "", "", f"{record.mean:.4f}")
    return table
