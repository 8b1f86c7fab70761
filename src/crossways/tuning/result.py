"""What a tuning found, and its files.

Legend: L layers, D documents.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crossways.study.atomic import write_text_atomic
from crossways.tuning.choose import efficient, qualifies
from crossways.tuning.confirm import Confirmation
from crossways.tuning.cost import PairCosts
from crossways.tuning.families import OwnRouting
from crossways.tuning.frontier import Point
from crossways.tuning.sensitivity import Sensitivity
from crossways.tuning.settings import LossLimit
from crossways.tuning.timing import Timing

FRONTIER, TABLE, PAGE = "frontier.json", "frontier.csv", "report.html"
CHECKPOINT, WINDOWS = "model", "confirmation.npz"
"""Files of a tuning in its folder."""


@dataclass(frozen=True)
class Reload:
    """The checkpoint, loaded and scored by a process of its own."""

    perplexity: float
    budget: float
    identical: bool
    """Whether the likelihood of every document and every layer's executed pairs are the same numbers, bit for bit."""


@dataclass(frozen=True)
class TuningResult:
    """What a tuning found."""

    model: str
    """Its name or class."""
    own: OwnRouting
    limit: LossLimit
    costs: PairCosts
    original: Point
    points: tuple[Point, ...]
    """Every setting that was measured, on the tuning text."""
    sensitivities: dict[str, tuple[Sensitivity, ...]]
    """By family, for each layer."""
    chosen: Point | None
    reason: str
    """Why nothing was chosen, or why what was chosen is not written; empty otherwise."""
    confirmation: Confirmation | None
    timing: Timing | None
    checkpoint: Path | None
    """Folder of the rerouted model; None if there is none."""
    reload: Reload | None
    protocol: dict[str, Any]
    """How it was measured: settings, sizes of the texts, versions."""


def write_evidence(result: TuningResult, out: Path) -> None:
    """Write `frontier.json` and `frontier.csv`."""
    write_text_atomic(out / FRONTIER, json.dumps(as_json(result), indent=1) + "\n")
    text = io.StringIO()
    rows = [_row(point, result) for point in (result.original, *result.points)]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(out / TABLE, text.getvalue())


def as_json(result: TuningResult) -> dict[str, Any]:
    """Plain JSON of everything."""
    confirmation = result.confirmation
    return {
        "model": result.model,
        "own": asdict(result.own),
        "max_loss": asdict(result.limit),
        "flops": asdict(result.costs),
        "original": _point(result.original, result),
        "points": [_point(point, result) for point in result.points],
        "sensitivities": {name: [asdict(each) for each in found] for name, found in result.sensitivities.items()},
        "chosen": _point(result.chosen, result) if result.chosen else None,
        "reason": result.reason,
        "confirmation": {**asdict(confirmation), "saved": confirmation.saved} if confirmation else None,
        "timing": asdict(result.timing) if result.timing else None,
        "checkpoint": CHECKPOINT if result.checkpoint else None,
        "reload": asdict(result.reload) if result.reload else None,
        "protocol": result.protocol,
    }


def _point(point: Point, result: TuningResult) -> dict[str, Any]:
    return _row(point, result) | {
        "rule": point.setting.rule.to_json(),
        "estimates": point.estimates,
        "budget_L": point.setting.budget_L,
        "executed_L": point.scored.executed_L,
        "nats_D": point.scored.nats_D,
        "tokens_D": point.scored.tokens_D,
    }


def _row(point: Point, result: TuningResult) -> dict[str, Any]:
    return {
        "family": point.setting.family,
        "allocation": point.setting.allocation,
        "leaky": point.setting.leaky,
        "experts_per_token": point.scored.budget,
        "expert_flops_per_token": point.flops,
        "share_of_original_flops": point.flops / result.original.flops,
        "perplexity": point.scored.perplexity,
        "nats": point.scored.nats,
        "loss": point.difference.nats,
        "loss_lower": point.difference.lower,
        "loss_upper": point.difference.upper,
        "predicted_loss": point.setting.predicted,
        "on_frontier": any(point is each for each in efficient(result.points, result.original)),
        "qualifies": qualifies(point, result.original, result.limit),
        "chosen": point is result.chosen,
    }
