"""The `crossways` command. Each command imports what it needs, so that `--help` costs nothing.

A mistake of the user is one line on standard error and exit code 2; anything else keeps its traceback.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from crossways import __version__
from crossways.commands.calibrate import calibrate_command
from crossways.commands.embed import embed_command
from crossways.commands.finetune import finetune_command
from crossways.commands.harness import harness_command
from crossways.commands.options import CorpusSource, RecipeOfText, TextOverrides, with_source
from crossways.commands.reroute import reroute_command
from crossways.commands.routers import routers_command
from crossways.commands.terminal import no_bars_in_logs
from crossways.commands.tune import tune_command
from crossways.commands.upcycle import upcycle_command
from crossways.errors import UserError

app = typer.Typer(
    help="Train, compare and look at Mixture-of-Experts routings.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

TRAIN, SAVED, PRETRAINED = "Train and compare", "Saved models", "Pretrained models"
"""Headings of the help."""

RecipeArgument = Annotated[str, typer.Argument(help="A shipped recipe (see `crossways recipes`) or a YAML file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe key, e.g. training.max_steps=100."),
]
OutOption = Annotated[Path | None, typer.Option(file_okay=False, help="Folder for all results; default runs/RECIPE.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Delete and repeat runs made with other settings.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe and its costs; train nothing.")
]


def main() -> None:
    """Entry point of the `crossways` command."""
    try:
        status = app(standalone_mode=False)
    except UserError as error:
        _refuse(str(error))
    except Exception as error:
        # What Typer raises for mistakes on the command line: classes of click or, by version, of its own copy.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        _refuse(f"{error.format_message()} (--help says what there is)")
    sys.exit(status)


def _refuse(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"crossways {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, compare and look at Mixture-of-Experts routings."""


@app.command(rich_help_panel=TRAIN)
def study(
    recipe: RecipeArgument,
    out: OutOption = None,
    overrides: SetOption = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to run instead of the recipe's, e.g. 0,1,2.")] = None,
    only: Annotated[str | None, typer.Option(help="Run only these variants, e.g. dense,cartesian.")] = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
) -> None:
    """Train and evaluate every variant of RECIPE with every seed, then write table.md, table.csv and report.html.

    The same command goes on where a killed one stopped and repeats no finished run.
    """
    from crossways.study.dry_run import describe_recipe
    from crossways.study.load import load_recipe
    from crossways.study.runner import run_study

    no_bars_in_logs()
    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        typer.echo(describe_recipe(loaded))
        return
    run_study(loaded, out or _default_out(recipe), only=_names(only), seeds=_seeds(seeds), force=force)


@app.command(rich_help_panel=TRAIN)
def train(
    recipe: RecipeArgument,
    variant: Annotated[str, typer.Option(help="Which variant of the recipe.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Default: the recipe's first seed.")] = None,
    out: OutOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    force: ForceOption = False,
) -> None:
    """Train and evaluate one variant of RECIPE; the model lands in OUT/VARIANT/seed-SEED/model.

    Takes up an interrupted run, and shares its folder with `crossways study`.
    """
    from crossways.study.dry_run import describe_recipe
    from crossways.study.load import load_recipe
    from crossways.study.plan import run_folder
    from crossways.study.runner import require_user_variant, run_study

    no_bars_in_logs()
    loaded = load_recipe(recipe, overrides or ())
    require_user_variant(variant, loaded)
    if dry_run:
        typer.echo(describe_recipe(loaded, [variant]))
        return
    out = out or _default_out(recipe)
    seed = loaded.seeds[0] if seed is None else seed
    run_study(loaded, out, only=[variant], seeds=[seed], force=force)
    typer.echo(f"model: {run_folder(out, variant, seed) / 'model'}")


@app.command(name="eval", rich_help_panel=SAVED)
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Folder or hub name of a saved model and its tokenizer.")],
    recipe: RecipeOfText = None,
    overrides: TextOverrides = None,
    corpus: CorpusSource = None,
    causal: Annotated[bool, typer.Option("--causal", help="Route by the decode twin, as generation does.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False, help="JSON file; default evaluation.json in CHECKPOINT; for a hub name, in runs/NAME."
        ),
    ] = None,
) -> None:
    """Evaluate a saved model on a corpus: print a table and write JSON.

    Without --recipe, a model trained by a study is evaluated as there.
    """
    from crossways.evaluation.command import evaluate_checkpoint

    no_bars_in_logs()
    beside = checkpoint if checkpoint.is_dir() else Path("runs") / checkpoint.name
    out = out or beside / "evaluation.json"
    evaluate_checkpoint(checkpoint, out, recipe, with_source(overrides, corpus), causal=causal)


@app.command(rich_help_panel=SAVED)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a saved model and its tokenizer.")],
    to: Annotated[str, typer.Option(help="Family of transformers: qwen2-moe or mixtral.")],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write.")],
) -> None:
    """Convert a model to a family of transformers, with the same logits, or say why that cannot be."""
    from crossways.models.export import export_checkpoint

    no_bars_in_logs()
    export_checkpoint(checkpoint, to, out)
    typer.echo(f"model: {out}")


@app.command(rich_help_panel=TRAIN)
def report(out: Annotated[Path, typer.Argument(help="Folder of a study.")]) -> None:
    """Write table and page again from the records of a study."""
    from crossways.study.publish import publish

    publish(out)


@app.command(rich_help_panel=TRAIN)
def recipes(
    reference: Annotated[bool, typer.Option("--reference", help="Print what a recipe may say, as Markdown.")] = False,
) -> None:
    """List the recipes inside the package."""
    from crossways.study.load import parse_yaml, shipped_recipes

    if reference:
        from crossways.study.reference import recipe_reference

        typer.echo(recipe_reference(), nl=False)
        return
    for name, file in shipped_recipes().items():
        typer.echo(f"{name}: {parse_yaml(file.read_text(encoding='utf-8'), name).get('title', '')}")


app.command("routers", rich_help_panel=TRAIN)(routers_command)
app.command("harness", rich_help_panel=SAVED)(harness_command)
app.command("embed", rich_help_panel=SAVED)(embed_command)
app.command("calibrate", rich_help_panel=SAVED)(calibrate_command)
app.command("reroute", rich_help_panel=PRETRAINED)(reroute_command)
app.command("tune", rich_help_panel=PRETRAINED)(tune_command)
app.command("upcycle", rich_help_panel=PRETRAINED)(upcycle_command)
app.command("finetune", rich_help_panel=PRETRAINED)(finetune_command)


def _default_out(recipe: str) -> Path:
    return Path("runs") / Path(recipe).stem


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


def _seeds(text: str | None) -> list[int] | None:
    names = _names(text)
    if names is None:
        return None
    if not all(name.isdigit() for name in names) or len(set(names)) < len(names):
        raise UserError(f"--seeds {text!r}: expected different whole numbers separated by commas, such as 0,1,2")
    return [int(name) for name in names]


if __name__ == "__main__":
    main()
