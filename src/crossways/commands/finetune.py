"""`crossways finetune`: supervised fine-tuning under several routing rules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def finetune_command(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe, smollm2-docstrings or usmoe-alpaca, or a file.")],
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder for everything; default runs/finetune/RECIPE.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. tuning.max_steps=100."),
    ] = None,
    only: Annotated[str | None, typer.Option(help="Only these rules, e.g. token-choice,usmoe.")] = None,
) -> None:
    """Fine-tune a routed model with TRL under every rule of RECIPE, on clean and on corrupted data.

    Writes a record of each run and table.md: perplexity of training and of held-out answers, clean and corrupted,
    and of the causal decode twin where a rule looks around. The same command goes on where a killed one stopped.
    """
    from crossways.commands.terminal import no_bars_in_logs
    from crossways.finetune.grid import run_grid
    from crossways.finetune.load import load_finetune_recipe

    no_bars_in_logs()
    loaded = load_finetune_recipe(recipe, overrides or ())
    names = [name.strip() for name in only.split(",")] if only else None
    run_grid(loaded, out or Path("runs/finetune") / Path(recipe).stem, only=names)
