"""What is asked of a tuning: text, budgets to try, how sure to be, what to time."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from crossways.errors import UserError
from crossways.evaluation.settings import EvaluationSettings
from crossways.settings import Settings
from crossways.training.corpus import CorpusSettings
from crossways.tuning.families import FAMILIES


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [name for name in names if name not in FAMILIES]
    if unknown or not names:
        raise ValueError(f"unknown families {unknown}; known: {', '.join(FAMILIES)}")
    return names


Fraction = Annotated[float, Field(gt=0.0)]


class TuningSettings(Settings):
    """How a budget is tuned. Texts are whole documents, or the front of long ones."""

    families: Annotated[tuple[str, ...], AfterValidator(_known)] = tuple(FAMILIES)
    """Ways to route that are compared: `token-choice` (the model's own), `usmoe` (leaky, never chosen),
    `usmoe-threshold` (its causal twin), `threshold` (the model's own score above a calibrated cutoff). Those ending
    in `-kept` leave the weights of chosen experts as they are among the own k; they are passed over for models that
    do so anyway."""
    budgets: tuple[Fraction, ...] = Field(default=(1.0, 0.85, 0.7, 0.55, 0.4), min_length=1)
    """Points of each frontier, as shares of the model's own experts per token. Sensible: 0.2 to 1."""
    levels: tuple[Annotated[float, Field(gt=0.0, lt=1.0)], ...] = Field(default=(0.25, 0.5, 0.75), min_length=1)
    """Shares of its own budget to which each layer is cut, alone, to measure its sensitivity; no layer is ever given
    less than the smallest. Each costs one pass per layer over `sensitivity_tokens`."""
    calibration_tokens: int = Field(default=16_384, ge=1)
    """Training tokens that set the cutoffs. Ten thousand settle one to about one per cent."""
    sensitivity_tokens: int = Field(default=4_096, ge=1)
    """Tokens, from the front of the calibration text, on which the layers' sensitivities are measured."""
    tuning_tokens: int = Field(default=16_384, ge=1)
    """Held-out tokens on which the frontier is drawn and the choice made."""
    confirmation_tokens: int = Field(default=32_768, ge=1)
    """Other held-out tokens on which the choice, once made, is confirmed or not."""
    document_tokens: int | None = Field(default=1_024, ge=2)
    """Most tokens taken of a document, from its front: the uncertainty is over documents, so many short ones say more
    than few long ones. None for whole documents."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0)
    """One-sided: a setting qualifies when the loss is below the limit in this share of the resamples."""
    resamples: int = Field(default=4_000, ge=100)
    """Bootstrap resamples of the documents."""
    seed: int = Field(default=0, ge=0)
    """Of the bootstrap."""
    rounds: int = Field(default=7, ge=0)
    """Interleaved repetitions of each timing; 0 takes none."""
    prefill_rows: int = Field(default=4, ge=1)
    """Windows in a timed scoring pass."""
    decode_rows: tuple[Annotated[int, Field(ge=1)], ...] = (1, 4)
    """Batch sizes at which generation is timed."""
    decode_tokens: int = Field(default=24, ge=2)
    """New tokens of a timed generation."""


class TuningRequest(Settings):
    """What `crossways tune` reads from `--set`."""

    corpus: CorpusSettings = CorpusSettings()
    """The text: cutoffs are set and sensitivities measured on its training documents; one half of the validation
    documents serves to choose, the other to confirm."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the split into training and validation documents."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """The perplexity protocol; `max_tokens` and `disable_top` are not used."""
    tuning: TuningSettings = TuningSettings()
    """How to tune."""


@dataclass(frozen=True)
class LossLimit:
    """How much worse a setting may be."""

    text: str
    """As it was given."""
    nats: float
    """The same in nats per token."""


def loss_limit(text: str) -> LossLimit:
    """Read `1%` (of perplexity) or `0.01nats` (per token).

    Raises:
        UserError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*(%|nats)", text.strip())
    if found is None:
        raise UserError(f"--max-loss {text!r}: expected a share of perplexity such as 1%, or nats such as 0.01nats")
    number = float(found[1])
    return LossLimit(text.strip(), math.log1p(number / 100) if found[2] == "%" else number)
