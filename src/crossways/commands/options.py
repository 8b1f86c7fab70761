"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeOfText = Annotated[
    str | None, typer.Option("--recipe", help="Take corpus, split_seed and evaluation from this recipe.")
]
TextOverrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override corpus, split_seed or evaluation keys."),
]
CorpusSource = Annotated[
    str | None,
    typer.Option("--corpus", help="Text: stdlib (default), files or a data set; short for --set corpus.source=..."),
]
ModelName = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="Folder or hub name of a causal language model.")
]
Preset = Annotated[str | None, typer.Option("--rule", help="Reroute by this preset first, such as usmoe.")]
Budget = Annotated[str | None, typer.Option("-k", help="Its experts per token: a number, or one per layer.")]
CalibrateOn = Annotated[
    str | None, typer.Option(help="Text to set the cutoffs of decode twins on: stdlib, files or a data set.")
]
CalibrateTokens = Annotated[int, typer.Option(min=1, help="How many tokens of it.")]
Dtype = Annotated[str | None, typer.Option(help="Of the weights, such as bfloat16; default as saved.")]
Device = Annotated[str | None, typer.Option(help="Such as cuda; default the CPU.")]
RecordFile = Annotated[
    Path | None, typer.Option(dir_okay=False, help="JSON file for the record; default: only print.")
]
ListTasks = Annotated[bool, typer.Option("--list", help="List the shipped task lists and exit.")]


def with_source(overrides: list[str] | None, corpus: str | None) -> list[str]:
    """Overrides, and the source of the text among them if it was given by itself."""
    return [*(overrides or ()), *([f"corpus.source={corpus}"] if corpus else [])]
