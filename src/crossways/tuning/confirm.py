"""The choice on text that played no part in it."""

from __future__ import annotations

from dataclasses import dataclass

from crossways.tuning.bench import Bench
from crossways.tuning.choose import Verdict, verdict_of
from crossways.tuning.compare import Difference, paired_difference
from crossways.tuning.cost import PairCosts
from crossways.tuning.frontier import Point
from crossways.tuning.score import Scored
from crossways.tuning.settings import LossLimit, TuningSettings
from crossways.tuning.texts import Text


@dataclass(frozen=True)
class Confirmation:
    """Original and choice, scored once each."""

    original: Scored
    chosen: Scored
    difference: Difference
    original_flops: float
    """Executed expert FLOPs per token."""
    chosen_flops: float
    verdict: Verdict

    @property
    def saved(self) -> float:
        """Share of the original's executed expert FLOPs that is saved."""
        return 1.0 - self.chosen_flops / self.original_flops


def confirm(
    bench: Bench,
    original: Point,
    chosen: Point,
    text: Text,
    costs: PairCosts,
    limit: LossLimit,
    settings: TuningSettings,
) -> Confirmation:
    """Score both on a text that nothing was chosen by."""
    before, after = (bench.score(point.setting.rule, point.estimates, text) for point in (original, chosen))
    difference = paired_difference(
        after, before, confidence=settings.confidence, resamples=settings.resamples, seed=settings.seed
    )
    return Confirmation(
        original=before,
        chosen=after,
        difference=difference,
        original_flops=costs.per_token(before.executed_L),
        chosen_flops=costs.per_token(after.executed_L),
        verdict=verdict_of(difference, limit),
    )


def why_not(confirmation: Confirmation, limit: LossLimit) -> str:
    """Why a choice is not to be saved; empty if it may be."""
    if confirmation.verdict != "contradicted":
        return ""
    return (
        f"the choice was not borne out: on other text it loses {confirmation.difference.nats:.4f} nats per token, "
        f"beyond {limit.text} ({limit.nats:.4f}); choose on more text (tuning.tuning_tokens) or with more confidence"
    )
