"""The contract of a score.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from crossways.rules.registry import build, catalogue


@dataclass(frozen=True)
class Score:
    """Maps float32 router logits (B, S, E) to non-negative float32 scores (B, S, E)."""

    name: ClassVar[str]
    """What selects the score in a configuration."""
    causal: ClassVar[bool] = True
    """A later token never changes an earlier token's scores."""
    batch_invariant: ClassVar[bool] = True
    """Another row of the batch never changes mine."""

    def __call__(self, logits_BSE: Tensor) -> Tensor:
        raise NotImplementedError


def score_catalogue() -> dict[str, type[Score]]:
    """Every score by name."""
    return catalogue(Score, "crossways.rules.score")


def build_score(spec: str | Mapping[str, Any]) -> Score:
    """A score from its name or its fields; raises `UserError` for an unknown one."""
    return build(Score, spec, score_catalogue())
