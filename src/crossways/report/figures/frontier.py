"""Plots of a tuning: quality against cost, the layers' sensitivities, and where the chosen budget goes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from crossways.report.style import INK, MUTED, VariantStyle, base_layout, plain


@dataclass(frozen=True)
class Spot:
    """A measured setting, as it is drawn."""

    budget: float
    """Mean executed experts per token and layer."""
    perplexity: float
    lower: float
    """Perplexity at the lower bound of the difference from the original."""
    upper: float
    """At its upper bound."""


@dataclass(frozen=True)
class Trail:
    """The settings of one family and allocation, by rising budget."""

    name: str
    style: VariantStyle
    dashed: bool
    """Per-layer budgets."""
    hollow: bool
    """Leaky."""
    spots: Sequence[Spot]


@dataclass(frozen=True)
class Curve:
    """The loss of one layer at each of its budgets, or a budget of each layer."""

    name: str
    style: VariantStyle
    x: Sequence[float]
    y: Sequence[float]
    dashed: bool = False


def frontier_figure(trails: Sequence[Trail], original: Spot, chosen: Spot | None, limit: float) -> go.Figure:
    """Perplexity against executed experts per token.

    Args:
        trails: what to draw.
        original: the model as it is.
        chosen: the choice, ringed.
        limit: the greatest perplexity that may be chosen.
    """
    figure = go.Figure(layout=base_layout(480))
    for trail in trails:
        _trail(figure, trail)
    figure.add_hline(y=limit, line={"color": MUTED, "dash": "dash", "width": 1.5})
    _mark(figure, original, "the model as it is", {"symbol": "star", "size": 15, "color": INK})
    if chosen is not None:
        ring = {"symbol": "circle-open", "size": 20, "color": INK, "line": {"width": 2.5}}
        _mark(figure, chosen, "chosen", ring)
    _titles(figure, "executed experts per token, mean over layers", "perplexity per token")
    _frame(figure, [*(spot for trail in trails for spot in trail.spots), original], limit)
    logarithmic = figure.layout.yaxis.type == "log"  # where an annotation, unlike a line, stands at the logarithm
    figure.add_annotation(
        {"x": 0, "xref": "paper", "y": math.log10(limit) if logarithmic else limit, "text": f"limit {limit:.2f}"}
        | {"xanchor": "left", "yanchor": "bottom", "font": {"size": 12, "color": MUTED}, "showarrow": False}
    )
    return figure


def layers_figure(curves: Sequence[Curve], y_title: str, *, step: bool = False) -> go.Figure:
    """One number for each routed layer, a line per curve."""
    figure = go.Figure(layout=base_layout(330))
    for curve in curves:
        figure.add_scatter(
            x=curve.x,
            y=curve.y,
            name=plain(curve.name, width=60, lines=1),
            legendgroup=plain(curve.name, width=60, lines=1),
            showlegend=True,
            mode="lines+markers",
            line=_line(curve.style, curve.dashed) | {"shape": "hvh" if step else "linear"},
            marker={"symbol": curve.style.symbol, "size": 6, "color": curve.style.color},
            hovertemplate="%{fullData.name}<br>layer %{x}: %{y:.4f}<extra></extra>",
        )
    _titles(figure, "routed layer", y_title)
    layers = max(len(curve.x) for curve in curves)
    figure.layout.xaxis.update(tick0=1, dtick=max(1, round(layers / 10)))
    return figure


def _trail(figure: go.Figure, trail: Trail) -> None:
    name = plain(trail.name, width=70, lines=1)
    symbol = trail.style.symbol + ("-open" if trail.hollow else "")
    figure.add_scatter(
        x=[spot.budget for spot in trail.spots],
        y=[spot.perplexity for spot in trail.spots],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [max(spot.upper - spot.perplexity, 0.0) for spot in trail.spots],
            "arrayminus": [max(spot.perplexity - spot.lower, 0.0) for spot in trail.spots],
            "thickness": 1,
            "width": 3,
            "color": trail.style.color,
        },
        name=name,
        legendgroup=name,
        showlegend=True,
        mode="lines+markers",
        line=_line(trail.style, trail.dashed),
        marker={"symbol": symbol, "size": 9, "color": trail.style.color},
        hovertemplate="%{fullData.name}<br>%{x:.3f} experts, perplexity %{y:.3f}<extra></extra>",
    )


def _line(style: VariantStyle, dashed: bool) -> dict[str, object]:
    return {"color": style.color, "dash": "dash" if dashed else "solid", "width": 2}


def _mark(figure: go.Figure, spot: Spot, name: str, marker: Mapping[str, object]) -> None:
    figure.add_scatter(
        x=[spot.budget],
        y=[spot.perplexity],
        name=name,
        mode="markers+text",
        text=[name],
        textposition="bottom center",
        textfont={"color": INK, "size": 12},
        marker=dict(marker),
        hovertemplate="%{fullData.name}: %{x:.3f} experts, perplexity %{y:.3f}<extra></extra>",
    )


def _frame(figure: go.Figure, spots: Sequence[Spot], limit: float) -> None:
    """Show what lies near the limit, and half of all settings in any case; on a logarithmic axis if that is a wide
    range. A budget cut much too far would flatten all else."""
    finite = sorted(spot.perplexity for spot in spots if math.isfinite(spot.perplexity))
    low = finite[0]
    top = max(low + 6 * max(limit - low, 0.02 * low), finite[len(finite) // 2])
    top = min(top, max(finite[-1], limit))
    inside = [spot.budget for spot in spots if spot.perplexity <= top]
    pad = 0.06 * (max(inside) - min(inside)) or 0.1
    figure.layout.xaxis.range = [min(inside) - pad, max(inside) + pad]
    if top > 2.5 * low:
        ticks = [digit * 10.0**power for power in range(8) for digit in (1, 1.5, 2, 3, 5, 7)]
        figure.layout.yaxis.update(type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
        figure.layout.yaxis.range = [math.log10(low) - 0.08 * math.log10(top / low), math.log10(1.05 * top)]
    else:
        figure.layout.yaxis.range = [low - 0.12 * (top - low), top + 0.08 * (top - low)]


def _titles(figure: go.Figure, x: str, y: str) -> None:
    font = {"size": 12, "color": MUTED}
    figure.layout.xaxis.update(title={"text": x, "font": font})
    figure.layout.yaxis.update(title={"text": y, "font": font})
