"""Which training passes make one optimizer step: what a `Trainer` knows and a model does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from crossways.models import CrosswaysModel


class OptimizerSteps(TrainerCallback):
    """Makes a model count optimizer steps, and balance by all batches of a step, where it would by itself take every
    training pass for a step; they differ when gradients are accumulated. `CrosswaysTrainer` has it; add it to any
    other `Trainer` of transformers.

    A step ends before its checkpoint is written, so an interrupted run goes on with the count that it had, and a
    model that is trained again goes on counting.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """From here on a pass is not a step."""
        for module in _models(kwargs["model"]):
            module.pass_is_step = False
            for router in module.routers:
                router.passes.clear()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """This is one."""
        for module in _models(kwargs["model"]):
            module.finish_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Whoever trains on without a trainer has one pass per step again."""
        for module in _models(kwargs["model"]):
            module.pass_is_step = True


def _models(model: nn.Module) -> Iterator[CrosswaysModel]:
    """Ours, whatever wraps them."""
    return (module for module in model.modules() if isinstance(module, CrosswaysModel))
