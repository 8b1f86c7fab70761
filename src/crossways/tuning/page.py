"""The page of a tuning: one HTML file that opens offline."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path

from markupsafe import Markup

from crossways.report.figures.frontier import Curve, Spot, Trail, frontier_figure, layers_figure
from crossways.report.shell import assets, environment, slot
from crossways.report.style import VariantStyle, figure_json, variant_styles
from crossways.study.atomic import write_text_atomic
from crossways.tuning.choose import efficient, qualifies
from crossways.tuning.families import FAMILIES, OWN
from crossways.tuning.frontier import Point
from crossways.tuning.result import TuningResult
from crossways.tuning.timing import notes


def write_page(result: TuningResult, out: Path) -> Path:
    """Write the page whole or not at all; returns its path."""
    styles = variant_styles([OWN, *FAMILIES])
    figures = {"frontier": frontier_figure(_trails(result, styles), *_marks(result), _limit(result))}
    figures["sensitivity"] = layers_figure(_sensitivities(result, styles), "loss, nats per token")
    if result.chosen is not None:
        figures["budgets"] = layers_figure(_budgets(result, styles), "executed experts per token", step=True)
    shown = (result.original, *result.points)
    context = assets() | {
        "title": f"Budget of {Path(result.model).name}",
        "result": result,
        "headline": headline(result),
        "rows": [(point, slot(styles[point.setting.family]), _mark(point, result)) for point in shown],
        "limit": _limit(result),
        "notes": notes(result.timing, result.chosen.scored.executed_L) if result.timing and result.chosen else [],
        "expert_share": _expert_share(result),
        "lowest": min(result.protocol["settings"]["levels"]),
        "figures": {name: Markup(figure_json(figure)) for name, figure in figures.items()},
    }
    return write_text_atomic(out, environment().get_template("tuning.html").render(context))


def headline(result: TuningResult) -> str:
    """The outcome in two sentences."""
    confirmation = result.confirmation
    if confirmation is None or result.chosen is None:
        return f"Nothing was chosen: {result.reason}."
    before, after, loss = confirmation.original, confirmation.chosen, confirmation.difference
    figures = (
        f"{result.chosen.setting.label} at {after.budget:.2f} instead of {before.budget:.2f} experts per token: "
        f"{confirmation.saved:.1%} fewer executed expert FLOPs, perplexity {after.perplexity:.3f} instead of "
        f"{before.perplexity:.3f} on text that played no part in the choice ({math.expm1(loss.nats):+.2%}, at most "
        f"{math.expm1(loss.upper):+.2%} with {result.protocol['settings']['confidence']:.0%} confidence)"
    )
    endings = {
        "confirmed": f"This confirms a loss within {result.limit.text}.",
        "not shown": f"The mean is within {result.limit.text}, its upper bound is not: more text would tell.",
        "contradicted": f"This is beyond {result.limit.text}: the choice was not borne out, and is not saved.",
    }
    return f"{figures[0].upper()}{figures[1:]}. {endings[confirmation.verdict]}"


def _mark(point: Point, result: TuningResult) -> str:
    if point is result.chosen:
        return "chosen"
    if qualifies(point, result.original, result.limit):
        return "qualifies"
    return "on the frontier" if any(point is each for each in efficient(result.points, result.original)) else ""


def _limit(result: TuningResult) -> float:
    return result.original.scored.perplexity * math.exp(result.limit.nats)


def _expert_share(result: TuningResult) -> float:
    return result.original.flops / (result.original.flops + result.costs.rest)


def _spot(point: Point, result: TuningResult) -> Spot:
    base = result.original.scored.perplexity
    bounds = (base * math.exp(min(bound, 50.0)) for bound in (point.difference.lower, point.difference.upper))
    return Spot(point.scored.budget, point.scored.perplexity, *bounds)


def _marks(result: TuningResult) -> tuple[Spot, Spot | None]:
    chosen = _spot(result.chosen, result) if result.chosen is not None else None
    return _spot(result.original, result), chosen


def _trails(result: TuningResult, styles: dict[str, VariantStyle]) -> list[Trail]:
    trails = []
    for (family, allocation), group in groupby(
        result.points, key=lambda point: (point.setting.family, point.setting.allocation)
    ):
        points = list(group)
        label = points[0].setting.label + (" †" if points[0].setting.leaky else "")
        if FAMILIES[family].integral:  # its uncut end is the model as it is
            points.append(result.original)
        points.sort(key=lambda point: point.scored.budget)
        trails.append(
            Trail(
                name=label,
                style=styles[family],
                dashed=allocation == "per-layer",
                hollow=FAMILIES[family].leaky,
                spots=[_spot(point, result) for point in points],
            )
        )
    return trails


def _sensitivities(result: TuningResult, styles: dict[str, VariantStyle]) -> list[Curve]:
    """For each family the loss at the smallest level, layer by layer."""
    return [
        Curve(
            name=f"{FAMILIES[name].label}, cut to {min(each.budget_N[0] for each in found):g}",
            style=styles[name],
            x=list(range(1, len(found) + 1)),
            y=[each.loss_N[0] for each in found],
        )
        for name, found in result.sensitivities.items()
    ]


def _budgets(result: TuningResult, styles: dict[str, VariantStyle]) -> list[Curve]:
    assert result.chosen is not None
    layers = list(range(1, len(result.own.k_L) + 1))
    return [
        Curve("the model as it is", styles[OWN], layers, result.original.scored.executed_L, dashed=True),
        Curve("chosen", styles[result.chosen.setting.family], layers, result.chosen.scored.executed_L),
    ]
