"""Schedules in optimizer steps: what a model counts while a `Trainer` drives it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from crossways.models import CrosswaysModel


class CountOptimizerSteps(TrainerCallback):
    """Makes scheduled gates and selections count optimizer steps instead of training passes, which differ when
    gradients are accumulated. `CrosswaysTrainer` has it; add it to any other `Trainer` of transformers.

    The count goes up at the end of a step, before its checkpoint is written, so an interrupted run goes on with the
    count that it had, and a model that is trained again goes on counting.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on passes do not count."""
        for module in _scheduled(kwargs["model"]):
            module.counts_passes = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One step more."""
        for module in _scheduled(kwargs["model"]):
            module.training_passes += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Whoever trains on without a trainer counts passes again."""
        for module in _scheduled(kwargs["model"]):
            module.counts_passes = True


def _scheduled(model: nn.Module) -> Iterator[CrosswaysModel]:
    """The models that count, whatever wraps them."""
    return (module for module in model.modules() if isinstance(module, CrosswaysModel) and module.config.scheduled)
