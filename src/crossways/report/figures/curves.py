"""Training loss over tokens: a thin line per seed, a thick smoothed mean per variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from crossways.report.compare import Groups
from crossways.report.style import MUTED, VariantStyle, base_layout, plain
from crossways.study.record import RunRecord

SMOOTHING = 0.05
"""Width of the moving average as a share of the logged points."""
MOST_POINTS = 600
"""Points drawn per line; a longer curve is thinned evenly, which no screen can show."""


def curves_figure(groups: Groups, styles: Mapping[str, VariantStyle]) -> go.Figure:
    """All variants in one plot; the seeds and the mean of a variant share a legend group."""
    figure = go.Figure(layout=base_layout(460))
    means = []
    for variant, records in groups.items():
        style, name = styles[variant], plain(records[0].label, width=60, lines=1)
        if len(records) > 1:
            for record in records:
                _line(figure, _points(record), variant, name, style, thin=True)
        mean = mean_curve(records)
        smooth = moving_average([loss for _, loss in mean])
        means.append(list(zip((tokens for tokens, _ in mean), smooth, strict=True)))
        _line(figure, means[-1], variant, name, style, thin=False)
    _axes(figure, means)
    return figure


def mean_curve(records: Sequence[RunRecord]) -> list[tuple[int, float]]:
    """(tokens, mean loss over seeds) where every record logged; not finite where any seed is not."""
    curves = [{point.tokens: point.loss for point in record.curve} for record in records]
    common = set.intersection(*(set(curve) for curve in curves)) if curves else set()
    return [(tokens, sum(curve[tokens] for curve in curves) / len(curves)) for tokens in sorted(common)]


def moving_average(values: Sequence[float], share: float = SMOOTHING) -> list[float]:
    """Centred moving average over `share` of the points.

    At the start, where the loss falls fast, the window shrinks evenly, so the first value is exact; at
    the end it is cut off.
    """
    half = int(len(values) * share / 2)
    smooth = []
    for i in range(len(values)):
        reach = min(half, i)
        window = values[i - reach : i + reach + 1]
        # Plain sums: `statistics` refuses infinities of both signs, and a diverged run must still be drawn.
        smooth.append(sum(window) / len(window))
    return smooth


def opening_range(means: Sequence[Sequence[tuple[int, float]]]) -> list[float] | None:
    """Loss range that shows everything after the first quarter of each curve; None when nothing is finite."""
    late = [
        loss
        for curve in means
        for tokens, loss in curve
        if math.isfinite(loss) and loss > 0 and tokens >= 0.25 * curve[-1][0]
    ]
    if not late:
        return None
    pad = 0.05 * (max(late) - min(late)) or 0.1
    return [max(min(late) - pad, 0.5 * min(late)), max(late) + pad]


def _points(record: RunRecord) -> list[tuple[int, float]]:
    return [(point.tokens, point.loss) for point in record.curve]


def _line(
    figure: go.Figure,
    points: Sequence[tuple[int, float]],
    variant: str,
    name: str,
    style: VariantStyle,
    thin: bool,
) -> None:
    kept = points[:: max(1, math.ceil(len(points) / MOST_POINTS))]
    figure.add_scatter(
        x=[tokens for tokens, _ in kept],
        y=[float(f"{loss:.5g}") for _, loss in kept],
        name=name,
        legendgroup=plain(variant, width=200, lines=1),
        showlegend=not thin,
        mode="lines",
        line={"color": style.color, "dash": style.dash, "width": 1 if thin else 2.4},
        opacity=0.3 if thin else 1.0,
        hoverinfo="skip" if thin else None,
        hovertemplate=None if thin else "%{fullData.name}<br>%{y:.3f} at %{x:.3s} tokens<extra></extra>",
    )


def _axes(figure: go.Figure, means: Sequence[Sequence[tuple[int, float]]]) -> None:
    title = {"size": 12, "color": MUTED}
    figure.layout.xaxis.update(title={"text": "training tokens", "font": title}, tickformat="~s")
    figure.layout.yaxis.update(title={"text": "loss, nats per token", "font": title})
    found = opening_range(means)
    if found is not None:
        figure.layout.yaxis.range = found
