"""Bits per byte of the variants of a comparison: where each stands, and how far from the baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from crossways.report.compare import Difference, Groups, honest_bits, unigram_bits
from crossways.report.style import GRID, INK, MUTED, VariantStyle, base_layout, category_axis
from crossways.study.record import RunRecord
from crossways.study.spread import Spread

Styles = Mapping[str, VariantStyle]


def bits_figure(groups: Groups, variants: Sequence[str], styles: Styles, baseline: str) -> go.Figure:
    """One row per variant: a point per seed and the mean of the honest figure, crosses for a leaky one."""
    labels = [groups[v][0].label + (" (baseline)" if v == baseline else "") for v in variants]
    figure = go.Figure(layout=_layout(len(variants), labels, "bits per byte"))
    for y, variant in enumerate(variants):
        _row(figure, y, list(honest_bits(groups[variant]).values()), styles[variant])
        _leaky(figure, y, groups[variant], styles[variant])
    floor = unigram_bits([record for variant in variants for record in groups[variant]])
    if floor is not None:
        figure.add_vline(x=floor, line={"color": MUTED, "dash": "dash", "width": 1.5})
        figure.add_annotation(
            {"x": floor, "y": 1, "yref": "paper", "text": f"unigram {floor:.2f}", "showarrow": False}
            | {"xanchor": "right", "yanchor": "bottom", "font": {"size": 12, "color": MUTED}}
        )
    return figure


def difference_figure(differences: Sequence[Difference], styles: Styles) -> go.Figure:
    """One row per variant: a point per seed and the mean of the difference from the baseline, zero drawn."""
    labels = [difference.label for difference in differences]
    figure = go.Figure(layout=_layout(len(labels), labels, "bits per byte, difference from the baseline"))
    figure.add_vline(x=0, line={"color": INK, "width": 1.5})
    for y, difference in enumerate(differences):
        values = list(difference.spread.values) if difference.spread else []
        _row(figure, y, values, styles[difference.variant], signed="+")
    figure.add_annotation(
        {"x": 0, "y": 1, "yref": "paper", "text": "← better  ", "showarrow": False, "xanchor": "right"}
        | {"yanchor": "bottom", "font": {"size": 12, "color": MUTED}}
    )
    return figure


def _row(figure: go.Figure, y: int, values: list[float], style: VariantStyle, signed: str = "") -> None:
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return
    hover = "%{fullData.name}: %{x:" + signed + ".4f}<extra></extra>"
    if len(finite) > 1:
        figure.add_scatter(
            x=finite,
            y=[y] * len(finite),
            name="one seed",
            mode="markers",
            marker={"symbol": "line-ns-open", "size": 14, "color": style.color, "line": {"width": 2}},
            opacity=0.65,
            hovertemplate=hover,
        )
    if len(finite) < len(values):
        return
    spread = Spread(tuple(finite))
    figure.add_scatter(
        x=[spread.mean],
        y=[y],
        name="mean" if spread.n > 1 else "one seed",
        mode="markers",
        marker={"symbol": style.symbol, "size": 12, "color": style.color},
        error_x={"array": [spread.deviation or 0.0], "thickness": 1.5, "width": 5, "color": style.color},
        hovertemplate=hover,
    )


def _leaky(figure: go.Figure, y: int, records: Sequence[RunRecord], style: VariantStyle) -> None:
    evaluations = [r.evaluation for r in records if r.evaluation.leaky]
    values = [e.bits_per_byte for e in evaluations if math.isfinite(e.bits_per_byte)]
    if not values:
        return
    figure.add_scatter(
        x=values,
        y=[y] * len(values),
        name="† training rule, looks ahead, not ranked",
        mode="markers+text",
        text=["†", *[""] * (len(values) - 1)],
        textposition="top center",
        marker={"symbol": "x-thin-open", "size": 9, "color": style.color, "line": {"width": 1.5}},
        textfont={"color": style.color},
        hovertemplate="%{fullData.name}: %{x:.4f}<extra></extra>",
    )


def _layout(rows: int, labels: Sequence[str], title: str) -> go.Layout:
    layout = base_layout(90 + 44 * max(rows, 1))
    layout.margin.t = 26
    layout.xaxis.update(
        title={"text": title, "font": {"size": 12, "color": MUTED}}, nticks=8, tickangle=0, gridcolor=GRID
    )
    layout.yaxis.update(category_axis(labels))
    return layout
