"""Options that `crossways embed` and `crossways harness` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
