"""The record of embedding tasks: `crossways embed` writes one JSON file of this form."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict

from crossways.evaluation.embeddings.settings import EmbeddingSettings
from crossways.evaluation.executed import RoutingRecord
from crossways.settings import Settings


class EmbeddingTask(Settings):
    """One task."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    task: str
    """Its name in mteb."""
    type: str
    """Such as STS or Clustering."""
    metric: str
    """The headline metric."""
    value: float
    """The headline figure, mean over splits and subsets."""
    scores: dict[str, Any]
    """Everything mteb says, by split."""


class EmbeddingRecord(Settings):
    """Everything that was measured, and under what."""

    format: Literal["crossways-embeddings/1"] = "crossways-embeddings/1"
    model: str
    """Folder or hub name."""
    settings: EmbeddingSettings
    """The protocol; `standardise: batch` says that embeddings depend on their neighbours."""
    fitted_on: str | None
    """Where fitted statistics come from."""
    width: int
    """Dimensions of an embedding."""
    routing: RoutingRecord
    """Rule, who decided, cutoffs and what was executed. Texts are embedded whole: a rule marked as leaky for later
    tokens sees nothing of an answer here."""
    tasks: tuple[EmbeddingTask, ...]
    """In the order asked for."""
    mean_by_type: dict[str, float]
    """Mean of the headline figures of each type of task."""
    mean: float
    """Mean over all tasks."""
    libraries: dict[str, str]
    """Versions."""
