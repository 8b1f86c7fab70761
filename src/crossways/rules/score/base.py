"""The contract of a score.

Legend: B batch, S sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from crossways.rules.registry import build, catalogue
from crossways.rules.value import Value


@dataclass(frozen=True)
class Score(Value):
    """Maps router logits (B, S, E), float32 or float64, to non-negative scores (B, S, E) of the same dtype.

    Most scores look at one token at a time. One that looks at others says so, leaves padding out by `valid_BS`, and
    names a decode twin.
    """

    name: ClassVar[str]
    """What selects the score in a configuration."""

    @property
    def causal(self) -> bool:
        """A later token never changes an earlier token's scores."""
        return True

    @property
    def batch_invariant(self) -> bool:
        """Another row of the batch never changes mine."""
        return True

    def __call__(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor:
        """Score.

        Args:
            logits_BSE: float32 (B, S, E).
            valid_BS: boolean (B, S), false for padding, whose own scores mean nothing; None when there is none.
        """
        raise NotImplementedError

    def decode_twin(self) -> Score:
        """The causal, batch-invariant score to generate with: the score itself if it is both."""
        return self

    def normaliser(self, logits_BSE: Tensor, valid_BS: Tensor | None = None) -> Tensor | None:
        """What the twin must know of a batch, float32 (E,), of which routers keep a running estimate; None if it
        needs nothing, NaN for a batch of padding alone."""
        return None

    def at(self, normaliser_E: Tensor) -> Score:
        """This score with the given normaliser, for twins that need one."""
        return self


def score_catalogue() -> dict[str, type[Score]]:
    """Every score by name."""
    return catalogue(Score, "crossways.rules.score")


def build_score(spec: str | Mapping[str, Any]) -> Score:
    """A score from its name or its fields; raises `UserError` for an unknown one."""
    return build(Score, spec, score_catalogue())
