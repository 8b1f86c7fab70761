"""Assemble the page: records and texts in, one HTML file out that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import plotly.graph_objects as go
from markupsafe import Markup

from crossways.report.compare import Difference, Groups, differences
from crossways.report.facts import environments, meta_line, protocols, warnings
from crossways.report.figures.bits import bits_figure, difference_figure
from crossways.report.figures.curves import SMOOTHING, curves_figure
from crossways.report.figures.disabled import disabled_figure
from crossways.report.figures.load import DOUBLINGS, load_figure
from crossways.report.shell import assets, environment, slot
from crossways.report.style import figure_json, variant_styles
from crossways.study.atomic import write_text_atomic
from crossways.study.columns import COLUMNS
from crossways.study.record import Comparison, RunRecord
from crossways.study.table import FOOTNOTE, Row, best_row, cell, group_by_variant, summarize


def render_report(
    records: Sequence[RunRecord],
    *,
    title: str,
    description: str = "",
    notice: str = "",
    comparisons: Sequence[Comparison] = (),
    recipe_text: str = "",
    corpus: str = "",
    out: Path,
) -> Path:
    """Write the report of a study as one self-contained HTML file.

    Args:
        records: finished runs, at most one per variant and seed; variants keep their order of appearance.
        title: heading of the page.
        description: what the study is; blank lines part paragraphs.
        notice: what the reader must not conclude, shown before everything else.
        comparisons: a section each; a variant without a finished run is named as missing.
        recipe_text: the resolved recipe, shown folded.
        corpus: one line on the text that was trained on.
        out: the file to write, whole or not at all; missing folders are made.

    Returns `out`. All texts are escaped. Raises `ValueError` when there are no records or two have the same
    variant and seed.
    """
    if not records:
        raise ValueError("there are no run records to report on; finish at least one run first")
    page = _Page(records, comparisons)
    context = page.context() | {"title": title, "description": description, "notice": notice}
    template = environment().get_template("page.html")
    return write_text_atomic(out, template.render(context, recipe_text=recipe_text, corpus=corpus))


@dataclass
class _Page:
    """What the template shows, and the figures gathered on the way."""

    records: Sequence[RunRecord]
    comparisons: Sequence[Comparison]
    figures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rows = summarize(self.records)
        self.groups: Groups = group_by_variant(self.records)
        self.styles = variant_styles(self.groups)

    def context(self) -> dict[str, object]:
        """Every name the template uses but the texts of the study."""
        sections = [self._comparison(number, c) for number, c in enumerate(self.comparisons)]
        content: dict[str, object] = {
            "table": self._table(),
            "variants": [(row, slot(self.styles[row.variant])) for row in self.rows],
            "sections": sections,
            "curves": self._curves(),
            "disabled": self._disabled(),
            "loads": self._loads(),
            "smoothing": f"{100 * SMOOTHING:.0f} %",
            "load_limit": f"{2**DOUBLINGS:.0f}",
            "meta": meta_line(self.records),
            "warnings": warnings(self.records),
            "protocols": protocols(self.records),
            "environments": environments(self.records),
        }
        return content | {"figures": self.figures} | assets()

    def _figure(self, name: str, figure: go.Figure) -> str:
        self.figures[name] = Markup(figure_json(figure))
        return name

    def _table(self) -> dict[str, object]:
        best = {column.key: best_row(self.rows, column) for column in COLUMNS}
        body = [(row, [(cell(row, column), best[column.key] is row) for column in COLUMNS]) for row in self.rows]
        heads = [(group, len(list(columns))) for group, columns in groupby(COLUMNS, key=lambda c: c.group)]
        starts = {next(i for i, c in enumerate(COLUMNS) if c.group == group) for group, _ in heads}
        marked = any(shown.leaky for _, cells in body for shown, _ in cells)
        emphasised = any(found is not None for found in best.values())
        return {"groups": heads, "columns": COLUMNS, "rows": body, "starts": starts} | {
            "footnote": FOOTNOTE if marked else "",
            "emphasised": emphasised,
        }

    def _comparison(self, number: int, comparison: Comparison) -> dict[str, object]:
        present = [variant for variant in comparison.members if variant in self.groups]
        rows: list[Difference] = differences(self.groups, comparison)
        base = self.groups.get(comparison.baseline)
        bits = bits_figure(self.groups, present, self.styles, comparison.baseline) if present else None
        drawn = [row for row in rows if row.spread is not None]
        return {
            "anchor": f"comparison-{number + 1}",
            "comparison": comparison,
            "baseline": base[0].label if base else comparison.baseline,
            "missing": [variant for variant in comparison.members if variant not in self.groups],
            "differences": [(row, slot(self.styles[row.variant])) for row in rows],
            "bits": self._figure(f"bits-{number + 1}", bits) if bits else None,
            "change": self._figure(f"change-{number + 1}", difference_figure(drawn, self.styles)) if drawn else None,
            "leaky": any(r.evaluation.leaky for variant in present for r in self.groups[variant]),
        }

    def _curves(self) -> str | None:
        drawn = {variant: group for variant, group in self.groups.items() if any(r.curve for r in group)}
        return self._figure("curves", curves_figure(drawn, self.styles)) if drawn else None

    def _disabled(self) -> str | None:
        shown: list[Row] = [row for row in self.rows if row.figures["disabled_raw"] is not None]
        return self._figure("disabled", disabled_figure(shown)) if shown else None

    def _loads(self) -> list[tuple[str, dict[str, object], Row]]:
        found = ((row, load_figure(self.groups[row.variant])) for row in self.rows)
        drawn = [(row, figure) for row, figure in found if figure is not None]
        return [
            (self._figure(f"load-{i}", figure), slot(self.styles[row.variant]), row)
            for i, (row, figure) in enumerate(drawn)
        ]
