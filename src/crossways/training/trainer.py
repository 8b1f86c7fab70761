"""transformers' `Trainer`, with the routing losses and expert loads logged apart and a stop at the first NaN.

Legend: R routers, E experts.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from crossways.errors import UserError
from crossways.training.steps import OptimizerSteps
from crossways.training.watch import FiniteWatch, StepTimer


class NonFiniteLossError(UserError):
    """Training diverged; the message says at which step and which checkpoint is the last good one."""


class CrosswaysTrainer(Trainer):
    """Logs, beside what `Trainer` logs: `lm_loss` (nats per token), each auxiliary loss (unweighted mean over
    routers), and per router `load_imbalance/<router>` (greatest load over mean load, 1 is even) and
    `idle_experts/<router>` (experts without a single token since the last entry); `step_seconds` is the median
    optimizer step, `interval_seconds` the sum of all steps since the last entry.

    On a GPU nothing is read back between two entries, so that the host stays ahead of the device; a loss that is not
    finite is then noticed at the next entry or checkpoint, with the step at which it became so."""

    def __init__(self, *args: Any, router_names: list[str] | None = None, **kwargs: Any) -> None:
        """As `Trainer`; `router_names` label the routers in logs, in the model's order."""
        super().__init__(*args, **kwargs)
        self.router_names = router_names or []
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._loads: list[Tensor] = []
        self._forward_passes = 0
        self._timer = StepTimer()
        self._finite = FiniteWatch(self.args.device)
        self.add_callback(_TimeSteps(self._timer))
        self.add_callback(OptimizerSteps)

    def compute_loss(  # type: ignore[override]
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """As `Trainer.compute_loss`; raises `NonFiniteLossError` instead of training on."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if model.training:
            self._finite.note(loss, self.state.global_step + 1)
            if loss.device.type == "cpu":  # reading costs nothing there
                self._require_finite()
            self._accumulate(outputs)
        return (loss, outputs) if return_outputs else loss

    def _accumulate(self, outputs: Any) -> None:
        self._sums["lm_loss"] += outputs.lm_loss.detach()
        for name, loss_R in outputs.aux_losses.items():
            self._sums[name] += loss_R.detach().mean() / self.args.gradient_accumulation_steps
        self._forward_passes += 1
        loads = [load_E.detach() for load_E in outputs.expert_load]
        self._loads = [a + b for a, b in zip(self._loads, loads, strict=True)] if self._loads else loads

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As `Trainer.log`, with the routing figures added to training entries."""
        if self._forward_passes:
            self._require_finite()
        if "loss" in logs and self._forward_passes:
            steps = self._forward_passes / self.args.gradient_accumulation_steps
            logs |= {name: float(total) / steps for name, total in self._sums.items()}
            logs |= self._timer.collect()
            for name, load_E in zip(self.router_names, self._loads, strict=True):
                logs[f"load_imbalance/{name}"] = float(load_E.max() / load_E.float().mean().clamp(min=1e-9))
                logs[f"idle_experts/{name}"] = float((load_E == 0).sum())
            self._sums.clear()
            self._loads, self._forward_passes = [], 0
        super().log(logs, *args, **kwargs)

    def _require_finite(self) -> None:
        if found := self._finite.found():
            self._diverged("the loss became {1} at step {0}".format(*found))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # A step may ruin the weights after a finite loss; such a checkpoint must not replace a good one.
        self._require_finite()
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                self._diverged(f"{name} became non-finite at step {self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _diverged(self, what: str) -> None:
        kept = get_last_checkpoint(self.args.output_dir)
        raise NonFiniteLossError(
            f"{what}; lower the learning rate (now {self.args.learning_rate:g}) or the gradient clip "
            f"({self.args.max_grad_norm:g}); last good checkpoint: {kept or 'none yet'}"
        )


class _TimeSteps(TrainerCallback):
    """Times each optimizer step, without logging and checkpointing."""

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self.timer.start(args.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop it."""
        self.timer.stop(args.device)
