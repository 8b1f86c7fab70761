"""What it costs when the router's first choice fails: perplexity with the top-1 routed expert disabled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from crossways.report.style import INK, MUTED, NORMAL, RAW, RENORMALIZED, base_layout, category_axis
from crossways.study.spread import Spread
from crossways.study.table import Row

SERIES = (
    ("perplexity", "all experts", NORMAL),
    ("disabled_renormalized", "top-1 disabled, renormalized", RENORMALIZED),
    ("disabled_raw", "top-1 disabled, raw", RAW),
)


def disabled_figure(rows: Sequence[Row]) -> go.Figure:
    """Three bars per variant on a logarithmic axis, with the spread over seeds; dense variants left out."""
    shown = [row for row in rows if row.figures["disabled_raw"] is not None]
    figure = go.Figure(layout=base_layout(80 + 62 * max(len(shown), 1)))
    lowest = []
    for place, (key, name, color) in enumerate(SERIES):
        found = [(y, row.figures[key]) for y, row in enumerate(shown)]
        bars = [(y, spread) for y, spread in found if spread is not None and spread.finite and spread.mean > 0]
        lowest += [spread.mean for _, spread in bars]
        _bars(figure, bars, name, color, offset=(place - 1) * 0.26 - 0.12)
    figure.layout.yaxis.update(category_axis([row.label for row in shown]))
    title = {"text": "validation perplexity per token, logarithmic", "font": {"size": 12, "color": MUTED}}
    figure.layout.xaxis.update(type="log", title=title, tickvals=_ticks(figure), tickformat="~s", tickangle=0)
    if lowest:
        highest = max(s.mean + (s.deviation or 0) for r in shown for k, _, _ in SERIES if (s := _finite(r, k)))
        figure.layout.xaxis.range = [math.log10(min(lowest) * 0.8), math.log10(highest * 1.08)]
    return figure


def _finite(row: Row, key: str) -> Spread | None:
    spread = row.figures[key]
    return spread if spread is not None and spread.finite and spread.mean > 0 else None


def _ticks(figure: go.Figure) -> list[float]:
    """Round values over the span of the bars, denser in a short span; Plotly would print bare digits."""
    values = [x for trace in figure.data for x in trace.x]
    if not values:
        return []
    low, high = math.floor(math.log10(min(values))) - 1, math.ceil(math.log10(max(values))) + 1
    decades = high - low - 2
    steps = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if max(values) < 5 * min(values) else (1, 2, 5) if decades < 4 else (1,)
    return [step * 10.0**power for power in range(low, high + 1, max(1, decades // 8)) for step in steps]


def _bars(figure: go.Figure, bars: Sequence[tuple[int, Spread]], name: str, color: str, offset: float) -> None:
    figure.add_bar(
        orientation="h",
        y=[y for y, _ in bars],
        x=[spread.mean for _, spread in bars],
        offset=offset,
        width=0.24,
        name=name,
        legendgroup=name,
        showlegend=True,
        marker={"color": color},
        error_x={"array": [spread.deviation or 0.0 for _, spread in bars], "thickness": 1.2, "width": 3}
        | {"color": INK},
        hovertemplate="%{fullData.name}: %{x:.4s}<extra></extra>",
    )
