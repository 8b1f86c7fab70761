"""`crossways tune`: the cheapest routing of a pretrained model within a stated loss of quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crossways.commands.options import CorpusSource, with_source


def tune_command(
    model_name: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub name of a routed model of transformers.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for the checkpoint and the evidence beside it.")],
    corpus: CorpusSource = None,
    max_loss: Annotated[
        str, typer.Option(help="How much worse the model may get: 1% of perplexity, or 0.01nats per token.")
    ] = "1%",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override corpus, split_seed, evaluation or tuning keys."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Load the checkpoint in a fresh process and compare.")
    ] = True,
) -> None:
    """Draw the cost-quality frontier of MODEL's routing, choose within a stated loss, confirm, and save.

    Writes OUT/frontier.json, frontier.csv and report.html, and OUT/model, which crossways.from_pretrained loads. The
    same command goes on where a killed one stopped. Exit code 1: nothing qualifies, or other text contradicts the
    choice; then there is no OUT/model.
    """
    from rich.console import Console

    from crossways.commands.terminal import no_bars_in_logs
    from crossways.study.load import apply_overrides, validated
    from crossways.surgery.checkpoint import load_causal_lm
    from crossways.training.corpus import load_corpus
    from crossways.tuning.page import headline
    from crossways.tuning.result import PAGE
    from crossways.tuning.settings import TuningRequest, loss_limit
    from crossways.tuning.table import settings_table, timing_table
    from crossways.tuning.timing import notes
    from crossways.tuning.tune import tune

    no_bars_in_logs()
    console = Console()
    loss_limit(max_loss)  # a mistake is told before the model is loaded
    sets = with_source(overrides, corpus)
    request = validated(TuningRequest, apply_overrides({}, sets), "crossways tune")
    text = load_corpus(request.corpus, request.split_seed)
    model, tokenizer = load_causal_lm(model_name)
    result = tune(
        model,
        tokenizer,
        text,
        out,
        max_loss=max_loss,
        settings=request.tuning,
        protocol=request.evaluation,
        verify=verify,
        console=console,
    )
    console.print(settings_table(result))
    if result.timing is not None and result.chosen is not None:
        console.print(timing_table(result.timing))
        for note in notes(result.timing, result.chosen.scored.executed_L):
            console.print(note, style="dim", markup=False, highlight=False)
    console.print(headline(result), markup=False, highlight=False)
    console.print(f"page: {out / PAGE}", highlight=False, soft_wrap=True, markup=False)
    if result.checkpoint is None:
        raise typer.Exit(1)
    if result.reload is not None:
        same = "the same numbers, bit for bit" if result.reload.identical else "NOT the same numbers bit for bit"
        console.print(f"loaded in a fresh process: perplexity {result.reload.perplexity:.6f}, {same}", markup=False)
    console.print(f"model: {result.checkpoint}", highlight=False, soft_wrap=True, markup=False)
