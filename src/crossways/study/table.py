"""Records in, table out: one row per variant with mean and spread over seeds, as Markdown, Rich or CSV."""

from __future__ import annotations

import csv
import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from crossways.study.columns import COLUMNS, Column
from crossways.study.record import RunRecord
from crossways.study.spread import Spread

DAGGER = "†"
FOOTNOTE = (
    f"{DAGGER} The rule looks at later tokens or at other rows of the batch, so this figure may flatter "
    "and is not ranked; the causal columns give what generation would see."
)


@dataclass(frozen=True)
class Row:
    """One variant over its seeds."""

    variant: str
    """Key in the recipe."""
    label: str
    """Name for readers."""
    description: str
    """One sentence, may be empty."""
    rule: str
    """Selection rule of training."""
    leaky: bool
    """Whether that rule may look ahead."""
    leak_reason: str
    """At what it looks."""
    seeds: tuple[int, ...]
    """Seeds of the finished runs, ascending."""
    figures: Mapping[str, Spread | None]
    """Figure of each column by `Column.key`, its values in the order of the seeds that have one; or None."""

    @property
    def n(self) -> int:
        """Number of finished runs."""
        return len(self.seeds)


@dataclass(frozen=True)
class Cell:
    """One figure as text."""

    value: str
    """The mean, or an en dash."""
    spread: str
    """Such as "± 0.04" or "n = 1"; empty where there is none to show."""
    reason: str
    """Why the value is missing or not finite; empty otherwise."""
    leaky: bool
    """Whether the figure must carry the dagger."""


def group_by_variant(records: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Records by variant in order of first appearance, seeds ascending.

    Raises `ValueError` when two records have the same variant and seed, as the seed would count twice.
    """
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        group = groups.setdefault(record.variant, [])
        if any(other.seed == record.seed for other in group):
            raise ValueError(f"two records of variant {record.variant!r} have seed {record.seed}; pass one per seed")
        group.append(record)
    return {variant: sorted(group, key=lambda r: r.seed) for variant, group in groups.items()}


def summarize(records: Sequence[RunRecord]) -> list[Row]:
    """One row per variant, in order of first appearance; label and rule are those of the lowest seed."""
    return [_row(group) for group in group_by_variant(records).values()]


def _row(group: Sequence[RunRecord]) -> Row:
    first = group[0]
    figures: dict[str, Spread | None] = {}
    for column in COLUMNS:
        values = tuple(float(v) for v in (column.read(record) for record in group) if v is not None)
        figures[column.key] = Spread(values) if values else None
    return Row(
        variant=first.variant,
        label=first.label,
        description=first.description,
        rule=first.evaluation.rule,
        leaky=any(record.evaluation.leaky for record in group),
        leak_reason=first.evaluation.leak_reason,
        seeds=tuple(record.seed for record in group),
        figures=figures,
    )


def cell(row: Row, column: Column) -> Cell:
    """The figure of `row` in `column` as text."""
    figure = row.figures[column.key]
    if figure is None:
        return Cell("–", "", column.missing, False)
    value, spread = figure.describe(column.show)
    if column.counted and len(set(figure.values)) == 1:
        spread = ""
    elif 1 < figure.n < row.n:
        spread += f", n = {figure.n}"
    reason = "" if figure.finite else "not finite for at least one seed: the run diverged or overflowed"
    return Cell(value, spread, reason, column.leaky and row.leaky)


def best_row(rows: Sequence[Row], column: Column) -> Row | None:
    """The row with the smallest mean, if it leads the next by more than the spread; else None.

    The spread of a gap is the root of the summed variances of the two figures; with one seed it is unknown,
    and nothing is emphasised. Missing figures are left out; a figure that is not finite never wins.
    """
    found = [(figure.mean, row, figure) for row in rows if (figure := row.figures[column.key]) is not None]
    ranked = sorted((item for item in found if math.isfinite(item[0])), key=lambda item: item[0])
    if not column.ranked or len(ranked) < 2:
        return None
    (low, row, best), (high, _, second) = ranked[:2]
    if best.deviation is None or second.deviation is None:
        return None
    return row if high - low > math.hypot(best.deviation, second.deviation) else None


def to_markdown(rows: Sequence[Row]) -> str:
    """The whole table in Markdown, with a footnote when a figure is marked."""
    lines = [
        "| Variant | " + " | ".join(f"{column.group}: {column.title}" for column in COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for row in rows:
        cells = [_text(cell(row, column)) for column in COLUMNS]
        lines.append("| " + " | ".join([_markdown(row.label), *cells]) + " |")
    return "\n".join([*lines, *_footnote(rows)]) + "\n"


_NARROW = ("parameters_active", "bits_per_byte", "training_rule_bits_per_byte", "disabled_raw")
_WIDE_TERMINAL = 140


def to_rich(rows: Sequence[Row], title: str | None = None, width: int = _WIDE_TERMINAL) -> Table:
    """The table for a terminal of `width` characters: the headline columns, or the few that fit into 80."""
    notes = "\n".join(_footnote(rows)[1:])
    table = Table(title=title and Text(title), caption=notes or None, box=box.SIMPLE_HEAD, caption_justify="left")
    table.add_column("Variant", overflow="fold")
    narrow = width < _WIDE_TERMINAL
    columns = [column for column in COLUMNS if (column.key in _NARROW if narrow else column.headline)]
    best = {column.key: best_row(rows, column) for column in columns}
    for column in columns:
        table.add_column(f"{column.group}\n{column.title}", justify="right")
    for row in rows:
        cells = [
            Text(_text(cell(row, column)), style="bold" if best[column.key] is row else "") for column in columns
        ]
        # Text and not str: a label in square brackets is no markup.
        table.add_row(Text(row.label), *cells)
    return table


def to_csv(rows: Sequence[Row]) -> str:
    """Raw numbers: for each figure `<key>_mean`, `<key>_std` (empty for one seed) and `<key>_n`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    header = ["variant", "label", "rule", "leaky", "seeds"]
    writer.writerow(header + [f"{column.key}_{part}" for column in COLUMNS for part in ("mean", "std", "n")])
    for row in rows:
        line: list[object] = [row.variant, row.label, row.rule, row.leaky, " ".join(map(str, row.seeds))]
        for column in COLUMNS:
            figure = row.figures[column.key]
            line += ["", "", 0] if figure is None else [figure.mean, figure.deviation, figure.n]
        writer.writerow(line)
    return out.getvalue()


def _text(cell: Cell) -> str:
    return " ".join(part for part in (cell.value + (DAGGER if cell.leaky else ""), cell.spread) if part)


def _footnote(rows: Sequence[Row]) -> list[str]:
    marked = any(cell(row, column).leaky for row in rows for column in COLUMNS)
    return ["", FOOTNOTE] if marked else []


def _markdown(text: str) -> str:
    """Text that cannot end its table cell or become HTML."""
    return html.escape(" ".join(text.split()), quote=False).replace("\\", "\\\\").replace("|", "\\|")
