"""`crossways reroute`: a pretrained model by another routing rule, calibrated and saved."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from crossways.commands.options import TextOverrides, with_source
from crossways.errors import UserError


def reroute_command(
    model_name: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder or hub name of a routed model of transformers."),
    ] = None,
    rule: Annotated[str | None, typer.Option(help="A preset, such as usmoe; --list shows them.")] = None,
    select: Annotated[str | None, typer.Option(help='A selection: its name, or JSON such as {"name": ...}.')] = None,
    score: Annotated[str | None, typer.Option(help="A score, likewise.")] = None,
    k: Annotated[
        str | None,
        typer.Option("-k", help="Mean experts per token: a number, or one per routed layer, with commas."),
    ] = None,
    renormalize: Annotated[
        bool | None, typer.Option("--renormalize/--raw", help="Whether each token's weights sum to one.")
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(help="Who computes the chosen pairs: own or crossways; default: crossways where it is faster."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for the rerouted model; default: only print.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Text to calibrate decode twins on: stdlib, files or a data set.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on, in whole documents.")] = 100_000,
    overrides: TextOverrides = None,
    list_presets: Annotated[bool, typer.Option("--list", help="List the presets and exit.")] = False,
) -> None:
    """Change how MODEL routes, without training; list what changed, and save it with --out.

    The saved folder is an ordinary checkpoint of transformers whose configuration carries the rule:
    crossways.from_pretrained(OUT) routes by it. Rules that look around need --corpus, on which the cutoffs that
    generation uses are set.
    """
    from rich.console import Console

    from crossways.commands.terminal import no_bars_in_logs

    console = Console()
    if list_presets:
        console.print(presets_table())
        return
    no_bars_in_logs()
    if model_name is None:
        raise UserError("give a MODEL: a folder or a hub name (or --list)")
    from crossways.evaluation.prepared import numbers
    from crossways.surgery.checkpoint import load_causal_lm
    from crossways.surgery.handle import handle_of
    from crossways.surgery.reroute import reroute

    model, tokenizer = load_causal_lm(model_name)
    attached = handle_of(model)
    if attached is not None:
        attached.undo()
    handle = reroute(
        model,
        rule,
        select=_spec(select),
        score=_spec(score),
        k=numbers(k),
        renormalize=renormalize,
        experts=experts,  # type: ignore[arg-type]  # what it may be is checked there
    )
    console.print(handle.table())
    if corpus is not None:
        report = _calibrated(model, tokenizer, model_name, corpus, overrides or [], tokens)
        console.print(report.table())
    if out is not None:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        if corpus is not None:
            (out / "calibration.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        console.print(f"written to {out}", highlight=False, soft_wrap=True, markup=False)


def presets_table() -> Any:
    """The presets, for a terminal."""
    from rich.table import Table

    from crossways.surgery.rule import presets

    table = Table("preset", "what it does", "from")
    for name, preset in presets().items():
        table.add_row(name, preset.summary, preset.source)
    return table


def _calibrated(model: Any, tokenizer: Any, name: str, corpus: str, overrides: list[str], tokens: int) -> Any:
    from crossways.calibrate import calibrate
    from crossways.evaluation.command import requested
    from crossways.evaluation.documents import documents_batches
    from crossways.evaluation.subject import subject_of
    from crossways.training.corpus import load_corpus

    request = requested(Path(name), None, with_source(overrides, corpus), "crossways reroute").for_context(
        subject_of(model).context
    )
    text = load_corpus(request.corpus, request.split_seed)
    return calibrate(
        model,
        documents_batches(text.train, tokenizer, request.evaluation, tokens),
        check=documents_batches(text.validation, tokenizer, request.evaluation, request.evaluation.max_tokens),
    )


def _spec(text: str | None) -> Any:
    """A rule's name, or its fields as JSON."""
    if text is None or not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{text!r} is not JSON: {error}") from error
