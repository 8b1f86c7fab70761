"""How a variant looks in every plot, and how text from a recipe enters a plot.

The colours were chosen by search for the largest smallest distance (OKLab, at least 0.13) between any two of
them for normal, protanopic and deuteranopic sight, apart for a light and a dark ground. Symbols and dashes
repeat what the colours say.
"""

from __future__ import annotations

import html
import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

import plotly.graph_objects as go

VARIANT_COLORS = ("#8c9096", "#5658cc", "#b61912", "#01696f", "#70ac06", "#bb7bfd", "#550c2b", "#32008b")
VARIANT_COLORS_DARK = ("#8c9197", "#3c88fd", "#bd2f43", "#a4ebea", "#d6e642", "#bdacff", "#fc7314", "#7858a9")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "pentagon", "star", "hexagon")
DASHES = ("solid", "dash", "dot")

INK, MUTED, GRID = "#33363f", "#6a6e7a", "#e3e5ea"
NORMAL, RAW, RENORMALIZED = "#9aa0aa", "#c8102e", "#2f6fce"
LOAD_SCALE = ("#2b5fa8", "#8fb3e0", "#f4f4f2", "#f0a868", "#b04a00")
LOAD_SCALE_DARK = ("#6aa5ff", "#345c96", "#26282e", "#9a5a1c", "#ffab5c")

DARK = {
    **dict(zip(VARIANT_COLORS, VARIANT_COLORS_DARK, strict=True)),
    **dict(zip(LOAD_SCALE, LOAD_SCALE_DARK, strict=True)),
    INK: "#dcdee4",
    MUTED: "#9a9eaa",
    GRID: "#32353d",
    NORMAL: "#7d828d",
    RAW: "#ff6b6b",
    RENORMALIZED: "#6ca6ff",
}
"""What each colour becomes on a dark ground; the page replaces them when the reader's scheme is dark."""


@dataclass(frozen=True)
class VariantStyle:
    """Colour, symbol and dash of one variant, the same in every plot of a page."""

    color: str
    """Colour on a light ground, "#rrggbb"."""
    symbol: str
    """Plotly marker symbol."""
    dash: str
    """Plotly line dash."""


def variant_styles(variants: Iterable[str]) -> dict[str, VariantStyle]:
    """A style per variant, in order; colours repeat after eight, open and dashed."""
    return {
        variant: VariantStyle(
            VARIANT_COLORS[i % len(VARIANT_COLORS)],
            SYMBOLS[i % len(SYMBOLS)] + ("" if i < len(SYMBOLS) else "-open"),
            DASHES[i // len(VARIANT_COLORS) % len(DASHES)],
        )
        for i, variant in enumerate(variants)
    }


def plain(text: str, width: int = 24, lines: int = 3) -> str:
    """Text for a Plotly label, which Plotly reads as a subset of HTML: escaped, wrapped, shortened."""
    rows = textwrap.wrap(" ".join(text.split()), width=width) or [""]
    if len(rows) > lines:
        rows = [*rows[: lines - 1], rows[lines - 1][: width - 1] + "…"]
    return "<br>".join(html.escape(row) for row in rows)


def base_layout(height: int, **changes: object) -> go.Layout:
    """The layout common to all plots: `height` in pixels, transparent ground, no title (captions say it)."""
    layout = go.Layout(
        template=go.layout.Template(),
        height=height,
        margin={"l": 8, "r": 16, "t": 12, "b": 44},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": INK},
        showlegend=False,
        hovermode="closest",
        dragmode=False,
        xaxis={"gridcolor": GRID, "zeroline": False, "automargin": True, "tickcolor": GRID},
        yaxis={"gridcolor": GRID, "zeroline": False, "automargin": True, "tickcolor": GRID},
    )
    return layout.update(changes)


def category_axis(labels: Iterable[str]) -> dict[str, object]:
    """A y axis with a label per row, the first on top. Positions are numbers: no label is read as a date."""
    texts = [plain(label) for label in labels]
    return {
        "tickvals": list(range(len(texts))),
        "ticktext": texts,
        "range": [len(texts) - 0.4, -0.6],
        "showgrid": False,
        "fixedrange": True,
    }


def figure_json(figure: go.Figure) -> str:
    """The figure as JSON that may stand inside a `<script>` element: no "<", null for what is not finite."""
    text = figure.to_json(engine="json", validate=False)
    assert text is not None
    json.loads(text, parse_constant=_refuse)
    # Plotly escapes it too, but does not promise to.
    return text.replace("<", "\\u003c")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} reached the JSON of a figure, which a browser cannot parse")
