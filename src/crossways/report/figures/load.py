"""Expert load per router: how evenly each router uses its experts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import plotly.graph_objects as go

from crossways.report.style import LOAD_SCALE, base_layout, plain
from crossways.study.record import RunRecord

DOUBLINGS = 3.0
"""The colours end at 2 to this power times, and one over that times, the even share."""


def load_profile(records: Sequence[RunRecord]) -> dict[str, list[float]]:
    """Relative load by router: load times number of experts (1 is even), busiest first, mean over seeds.

    The number of an expert means nothing from one seed to another, so experts are matched by rank. Routers
    come in the order of the first record; one that another seed lacks, or has with other experts, is averaged
    without that seed.
    """
    profile: dict[str, list[list[float]]] = {}
    for record in records:
        for router in record.expert_load:
            finite = [share if math.isfinite(share) else 0.0 for share in router.load]
            relative = sorted((share * len(finite) for share in finite), reverse=True)
            ranked = profile.setdefault(router.router, [])
            if not ranked or len(ranked[0]) == len(relative):
                ranked.append(relative)
    return {name: [statistics.fmean(rank) for rank in zip(*seeds, strict=True)] for name, seeds in profile.items()}


def load_figure(records: Sequence[RunRecord]) -> go.Figure | None:
    """A heatmap of one variant, a row per router and a column per rank; None when it has no routers."""
    profile = load_profile(records)
    if not profile:
        return None
    relative = list(profile.values())
    figure = go.Figure(layout=base_layout(58 + max(14, min(26, 420 // len(relative))) * len(relative)))
    figure.add_heatmap(
        z=[[_doublings(value) for value in row] for row in relative],
        customdata=relative,
        y=list(range(len(relative))),
        x=list(range(1, max(map(len, relative)) + 1)),
        zmin=-DOUBLINGS,
        zmax=DOUBLINGS,
        colorscale=[[i / (len(LOAD_SCALE) - 1), color] for i, color in enumerate(LOAD_SCALE)],
        showscale=False,
        xgap=1,
        ygap=1,
        hovertemplate="%{text}, expert of rank %{x}: %{customdata:.2f} × the even share<extra></extra>",
        text=[[plain(name, width=60, lines=1)] * len(row) for name, row in profile.items()],
        texttemplate="",
    )
    _axes(figure, list(profile), max(map(len, relative)))
    return figure


def _axes(figure: go.Figure, names: Sequence[str], experts: int) -> None:
    every = math.ceil(len(names) / 30)
    figure.layout.yaxis.update(
        tickvals=list(range(0, len(names), every)),
        ticktext=[plain(name, width=20, lines=1) for name in names[::every]],
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
        tickfont={"size": 11},
        fixedrange=True,
    )
    ticks = sorted({1, experts, *(experts * i // 4 for i in (1, 2, 3) if experts >= 8)})
    figure.layout.xaxis.update(tickvals=ticks, showgrid=False, tickfont={"size": 11}, fixedrange=True)
    figure.layout.margin.update(t=4, b=24, r=6)


def _doublings(relative: float) -> float:
    return max(-DOUBLINGS, min(DOUBLINGS, math.log2(relative))) if relative > 0 else -DOUBLINGS
