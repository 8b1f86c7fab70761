"""`crossways harness`: tasks of lm-eval on a saved model, with the routing in the record."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

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
    from rich.console import Console
    from rich.table import Table

    from crossways.evaluation.harness.record import HarnessRecord


def harness_command(
    model_name: ModelName = None,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval's names, task files (YAML), or a list (see --list), with commas.")
    ] = None,
    rule: Preset = None,
    k: Budget = None,
    causal: Annotated[
        bool, typer.Option("--causal/--leaky", help="Let decode twins decide, or the rule itself, marked as leaky.")
    ] = True,
    calibrate_on: CalibrateOn = None,
    calibrate_tokens: CalibrateTokens = 100_000,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples in the prompt of tasks that leave it open.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many documents of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 8,
    max_length: Annotated[int | None, typer.Option(min=2, help="Most tokens; default the model's context.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    out: RecordFile = None,
    list_tasks: ListTasks = False,
) -> None:
    """Run downstream tasks of lm-eval on MODEL; print the figures and write them with the routing behind them."""
    from rich.console import Console

    from crossways.commands.terminal import no_bars_in_logs
    from crossways.extras import require

    console = Console()
    if list_tasks:
        print_lists(console, "lm-eval")
        return
    if model_name is None or tasks is None:
        raise UserError("give a MODEL and --tasks (or --list)")
    require("lm_eval", extra="eval")
    from crossways.evaluation.harness.run import evaluate_harness
    from crossways.evaluation.prepared import numbers, prepared
    from crossways.study.atomic import write_text_atomic

    no_bars_in_logs()
    model, tokenizer = prepared(
        model_name,
        rule=rule,
        k=numbers(k),
        calibrate_on=calibrate_on,
        calibrate_tokens=calibrate_tokens,
        dtype=dtype,
        device=device,
    )
    record = evaluate_harness(
        model,
        tokenizer,
        tasks,
        causal=causal,
        batch_size=batch_size,
        max_length=max_length,
        num_fewshot=num_fewshot,
        limit=limit,
        name=model_name,
        progress=sys.stderr.isatty(),
    )
    console.print(figures_table(record))
    if out is not None:
        write_text_atomic(out, record.model_dump_json(indent=1) + "\n")
        console.print(f"written to {out}", highlight=False, soft_wrap=True, markup=False)


def print_lists(console: Console, tool: Literal["lm-eval", "mteb"]) -> None:
    """The shipped task lists of a tool."""
    from rich.text import Text

    from crossways.evaluation.task_lists import shipped_lists

    for name, each in shipped_lists(tool).items():
        console.print(Text(name, style="bold"), Text(each.title, style="italic"), sep="  ")
        tasks = ", ".join(task.task for task in each.tasks)
        for line in (each.source, tasks, each.notes):
            console.print(Text(f"  {line}"), soft_wrap=True)


def figures_table(record: HarnessRecord) -> Table:
    """The headline figures, for a terminal."""
    from rich.table import Table

    routing, protocol = record.routing, record.protocol
    mark = " (leaky)" if routing.leaky else ""
    spent = "" if routing.experts_per_token is None else f"; {routing.experts_per_token:.4g} experts per token"
    caption = (
        f"{routing.rule}{f', by {routing.twin}' if routing.twin else ''}{spent}; batch {protocol.batch_size}, "
        f"at most {protocol.max_length} tokens, {protocol.truncated} of {protocol.requests} requests cut"
    )
    if routing.leaky:
        caption += f"\nmay flatter: {routing.leak_reason}"
    table = Table("task", "metric", "value", "standard error", "few-shot", title=record.model, caption=caption)
    table.caption_justify = "left"
    for task in record.tasks:
        error = "" if task.stderr is None else f"{task.stderr:.4f}"
        shots = "" if task.num_fewshot is None else str(task.num_fewshot)
        table.add_row(task.label, task.metric, f"{task.value:.4f}{mark}", error, shots)
    if record.mean is not None:
        table.add_row("mean", "", f"{record.mean:.4f}{mark}", "", "")
    return table
