"""One model on the bench: routed one way, measured, and given back as it was.

Legend: L layers, C cutoffs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from crossways.calibrate import calibrate
from crossways.surgery.handle import Handle
from crossways.surgery.reroute import reroute
from crossways.surgery.rule import Rule
from crossways.tuning.score import Scored, score_text
from crossways.tuning.store import Store
from crossways.tuning.texts import Text

Estimates = list[dict[str, list[float]]]
"""What each layer's decode twin needs, as `Handle.estimates` gives it."""


class Bench:
    """Routes the model, measures, undoes; never measures the same thing twice."""

    def __init__(
        self,
        model: Any,
        store: Store,
        calibration: Text,
        dtype: torch.dtype = torch.float32,
        progress: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            model: not rerouted, in evaluation mode.
            store: keeps the measurements.
            calibration: text that sets cutoffs.
            dtype: in which texts are scored.
            progress: called after each measurement, made or found.
        """
        self.model, self.store, self.calibration = model, store, calibration
        self.dtype, self.progress = dtype, progress

    @contextmanager
    def routed(self, rule: Rule, estimates: Estimates | None = None) -> Iterator[Handle]:
        """The model under a rule, for as long as the context lasts."""
        with reroute(self.model, rule) as handle:
            if estimates:
                handle.set_estimates(estimates)
            yield handle

    def calibrated(self, rule: Rule) -> Estimates:
        """Cutoffs at which the rule spends its budgets on the calibration text.

        One pass: each layer takes the cutoff of the batch it sees, so the layers after it see what the rule itself
        makes, and the cutoffs kept are those of all batches together.
        """

        def measure() -> Estimates:
            batches = self.calibration.batches()
            with self.routed(rule) as handle:
                calibrate(self.model, batches, passes=0, check=batches[-1:])
                return handle.estimates()

        key = {"what": "cutoffs", "rule": rule.to_json(), "text": self.calibration.digest}
        return self._kept(key, measure)

    def score(self, rule: Rule, estimates: Estimates | None, text: Text) -> Scored:
        """A text under a rule."""

        def measure() -> dict[str, Any]:
            with self.routed(rule, estimates):
                return asdict(score_text(self.model, text, self.dtype))

        key = {"what": "score", "rule": rule.to_json(), "estimates": estimates or [], "text": text.digest}
        found = self._kept(key, measure)
        values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        return Scored(**values)

    def _kept(self, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        value = self.store.get(key, measure)
        if self.progress is not None:
            self.progress()
        return value


def with_cutoffs(estimates: Estimates, layer: int, cutoff_C: Sequence[float]) -> Estimates:
    """Estimates with the cutoffs of one layer replaced."""
    return [
        {**known, "cutoff": list(cutoff_C)} if index == layer else dict(known)
        for index, known in enumerate(estimates)
    ]
