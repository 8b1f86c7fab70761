"""The outcome of a tuning, for a terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from crossways.tuning.choose import qualifies
from crossways.tuning.frontier import Point
from crossways.tuning.result import TuningResult
from crossways.tuning.timing import Timing


def settings_table(result: TuningResult) -> Table:
    """Every setting, in the order in which they were measured."""
    texts = result.protocol["texts"]["tuning"]
    caption = (
        f"{texts['documents']} documents, {texts['tokens']} tokens to choose on; executed experts per token, their "
        "FLOPs as a share of the original's; loss against it in nats per token; † looks at later tokens"
    )
    table = Table(
        title=Text(result.model),
        caption=caption,
        caption_justify="left",
        title_justify="left",
        box=SIMPLE_HEAD,
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("setting")  # alone gives way where the terminal is narrow
    for name in ("experts", "FLOPs", "perplexity", "loss", "at most"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for point in (result.original, *result.points):
        mark = "qualifies" if qualifies(point, result.original, result.limit) else ""
        table.add_row(
            _name(point),
            f"{point.scored.budget:.2f}",
            f"{point.flops / result.original.flops:.1%}",
            f"{point.scored.perplexity:.4g}",
            f"{point.difference.nats:+.4f}",
            f"{point.difference.upper:+.4f}",
            "chosen" if point is result.chosen else mark,
            style="bold" if point is result.chosen else "dim" if point.setting.leaky else None,
        )
    return table


def _name(point: Point) -> str:
    setting = point.setting
    if setting.allocation == "own":
        return setting.label
    return f"{setting.family}, {setting.allocation}" + (" †" if setting.leaky else "")


def timing_table(timing: Timing) -> Table:
    """Wall time of both routings."""
    table = Table(title="tokens per second, interleaved rounds: median and quartiles", title_justify="left")
    table.add_column("task")
    for name in ("original", "chosen", "chosen / original", "by our experts alone"):
        table.add_column(name, justify="right")
    for each in timing.timed:
        ratio = f"{each.speedup:.2f} ({each.speedup_low:.2f} to {each.speedup_high:.2f})"
        alone = "" if each.by_experts is None else f"{each.by_experts:.2f}"
        table.add_row(each.task, f"{each.original:.1f}", f"{each.chosen:.1f}", ratio, alone)
    return table
