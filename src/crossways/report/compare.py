"""Differences of variants from a baseline, seed by seed, in honest bits per byte."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from crossways.study.record import Comparison, RunRecord
from crossways.study.spread import Spread, fixed

Groups = Mapping[str, Sequence[RunRecord]]
"""Records by variant, seeds ascending."""


@dataclass(frozen=True)
class Difference:
    """How far a variant is from the baseline, in bits per byte; negative is better."""

    variant: str
    """Key of the variant."""
    label: str
    """Name for readers."""
    spread: Spread | None
    """One difference per seed that both have finished; None when there is none."""

    @property
    def texts(self) -> tuple[str, str]:
        """Mean and spread as text."""
        return ("–", "") if self.spread is None else self.spread.describe(fixed(3), signed=True)

    @property
    def verdict(self) -> str:
        """One phrase that claims no more than the spread allows."""
        if self.spread is None:
            return "no seed with a causal figure in common with the baseline"
        if not self.spread.finite:
            return "not finite"
        side = "better" if self.spread.mean < 0 else "worse"
        if self.spread.deviation is None:
            return f"{side} with the one seed there is; its spread is unknown"
        if abs(self.spread.mean) > self.spread.deviation:
            return f"{side} by more than the spread"
        return "within the spread"


def honest_bits(records: Sequence[RunRecord]) -> dict[int, float]:
    """Honest bits per byte by seed, where there is one."""
    found = ((record.seed, record.evaluation.honest_bits_per_byte) for record in records)
    return {seed: value for seed, value in found if value is not None}


def differences(groups: Groups, comparison: Comparison) -> list[Difference]:
    """The difference of every member that has records, the baseline left out, paired by seed."""
    base = honest_bits(groups.get(comparison.baseline, ()))
    found = []
    for variant in comparison.members:
        if variant == comparison.baseline or variant not in groups:
            continue
        own = honest_bits(groups[variant])
        values = tuple(own[seed] - base[seed] for seed in sorted(own.keys() & base.keys()))
        found.append(Difference(variant, groups[variant][0].label, Spread(values) if values else None))
    return found


def unigram_bits(records: Sequence[RunRecord]) -> float | None:
    """Mean bits per byte of the unigram model over the records; None when none is finite."""
    values = [value for r in records if math.isfinite(value := r.evaluation.unigram_bits_per_byte)]
    return sum(values) / len(values) if values else None
