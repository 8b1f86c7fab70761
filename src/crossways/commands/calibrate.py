"""`crossways calibrate`: set the decode twins' cutoffs of a saved model on a corpus, and save it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from crossways.commands.options import CorpusSource, RecipeOfText, TextOverrides, with_source


def calibrate_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a saved model and its tokenizer.")],
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for the calibrated model; may be CHECKPOINT itself.")
    ],
    recipe: RecipeOfText = None,
    overrides: TextOverrides = None,
    corpus: CorpusSource = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Training tokens to calibrate on, in whole documents.")
    ] = 100_000,
    passes: Annotated[int, typer.Option(min=0, help="Passes under the twins; 0 calibrates under the rule.")] = 1,
) -> None:
    """Set the thresholds that generation routes by, on the training documents of a corpus.

    Prints how close the budgets come on the validation documents, and writes the same to OUT/calibration.json.
    """
    from rich.console import Console

    from crossways.calibrate import calibrate
    from crossways.commands.terminal import no_bars_in_logs
    from crossways.evaluation.command import requested
    from crossways.evaluation.documents import documents_batches
    from crossways.evaluation.subject import subject_of
    from crossways.surgery.checkpoint import load_causal_lm
    from crossways.training.corpus import load_corpus

    no_bars_in_logs()
    request = requested(checkpoint, recipe, with_source(overrides, corpus), "crossways calibrate")
    model, tokenizer = load_causal_lm(checkpoint)
    request = request.for_context(subject_of(model).context)
    text = load_corpus(request.corpus, request.split_seed)

    report = calibrate(
        model,
        documents_batches(text.train, tokenizer, request.evaluation, tokens),
        passes=passes,
        check=documents_batches(text.validation, tokenizer, request.evaluation, request.evaluation.max_tokens),
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "calibration.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    console = Console()
    console.print(report.table())
    console.print(f"written to {out}", highlight=False, soft_wrap=True, markup=False)
