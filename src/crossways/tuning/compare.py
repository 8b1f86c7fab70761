"""The difference between two routings of the same text, with its uncertainty over documents.

Legend: D documents, N resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from crossways.tuning.score import Scored


@dataclass(frozen=True)
class Difference:
    """Nats per token more than the original; negative is better."""

    nats: float
    lower: float
    """One-sided bound: the difference is above it with the given confidence."""
    upper: float
    """One-sided bound: the difference is below it with the given confidence."""
    documents: int


def paired_difference(
    changed: Scored, original: Scored, *, confidence: float = 0.95, resamples: int = 4_000, seed: int = 0
) -> Difference:
    """Percentile bootstrap over documents, paired: a resample holds the same documents under both routings, so that
    what makes a document hard for both cancels.

    Raises:
        ValueError: if the two did not score the same documents.
    """
    if changed.tokens_D != original.tokens_D:
        raise ValueError(
            f"paired differences need the same documents; {len(changed.tokens_D)} and {len(original.tokens_D)} given"
        )
    token_D = np.asarray(original.tokens_D, dtype=float)
    nats_D = np.asarray(changed.nats_D) - np.asarray(original.nats_D)
    documents = len(token_D)
    drawn_ND = np.random.default_rng(seed).multinomial(documents, np.full(documents, 1 / documents), size=resamples)
    mean_N = (drawn_ND @ nats_D) / (drawn_ND @ token_D)
    lower, upper = np.quantile(mean_N, [1 - confidence, confidence])
    return Difference(float(nats_D.sum() / token_D.sum()), float(lower), float(upper), documents)
