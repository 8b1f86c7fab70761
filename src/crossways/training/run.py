"""Train one model on one corpus: from settings to a model in memory, resumable at any point."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from crossways.errors import UserError
from crossways.gates import Gate, build_gate
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM
from crossways.models.losses import AUXILIARY_LOSSES
from crossways.training.checkpoints import remove_torn_checkpoints
from crossways.training.corpus import Corpus
from crossways.training.memory import peak_memory_bytes, reset_peak_memory
from crossways.training.packing import token_counts, training_windows
from crossways.training.recompute import recompute_arguments
from crossways.training.settings import TrainingSettings
from crossways.training.start import starting_model
from crossways.training.trainer import CrosswaysTrainer


@dataclass(frozen=True)
class TrainedModel:
    """A finished run."""

    model: CrosswaysForCausalLM
    curve: list[dict[str, Any]]
    """Log entries: step, tokens, loss (language model, nats per token), auxiliary (name to value)."""
    steps: int
    tokens: int
    """Tokens trained on."""
    tokens_per_second: float
    """From the median step of the logging intervals after the first, without logging and checkpointing."""
    wall_seconds: float
    """Sum of all optimizer steps, over the pieces of an interrupted run."""
    peak_memory_bytes: int
    """Of this process, since the run's last start."""


def train_model(
    config: CrosswaysConfig,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainingSettings,
    out_dir: Path,
    seed: int,
    *,
    cache_dir: Path | None = None,
    init_from: Path | None = None,
    progress: bool = True,
) -> TrainedModel:
    """Train a fresh or a saved model, or go on from the newest checkpoint in `out_dir`.

    Args:
        config: the model; its vocabulary must hold the tokenizer's.
        corpus: what to train on.
        tokenizer: turns the corpus into ids.
        settings: how to train.
        out_dir: for checkpoints and tracker logs.
        seed: of initialisation, data order and dropout.
        cache_dir: for tokenised text; default `out_dir / "cache"`.
        init_from: folder of the saved model to start from; None draws fresh weights.
        progress: show transformers' progress bar.

    Raises:
        UserError: a saved model that does not fit, windows longer than the model's context, a corpus too short for
            one window, or a loss that is not finite (`NonFiniteLossError`, which names the step and the last good
            checkpoint).
    """
    if settings.sequence_length > config.max_position_embeddings:
        raise UserError(
            f"training.sequence_length {settings.sequence_length} exceeds the model's context: raise "
            f"model.max_position_embeddings (now {config.max_position_embeddings})"
        )
    remove_torn_checkpoints(out_dir)
    cache_dir = cache_dir or out_dir / "cache"
    windows = training_windows(corpus, tokenizer, settings.sequence_length, seed, cache_dir)
    set_seed(seed)
    model = starting_model(config, init_from)
    if build_gate(config.gate).counts_tokens and any(cast(Gate, gate).wants_counts for gate in model.model.gates):
        counts_V = token_counts(corpus, tokenizer, config.vocab_size, cache_dir)
        model.model.count_tokens(torch.from_numpy(counts_V))
    trainer = CrosswaysTrainer(
        model=model,
        args=_arguments(settings, out_dir, seed, progress),
        train_dataset=windows,
        router_names=config.router_names,
    )
    return _run(trainer, out_dir, _tokens_per_step(windows, settings))


def _arguments(settings: TrainingSettings, out_dir: Path, seed: int, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(out_dir),
        max_steps=settings.max_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_scheduler,
        lr_scheduler_kwargs=dict(settings.lr_scheduler_kwargs),
        warmup_steps=round(settings.warmup_fraction * settings.max_steps),
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.dtype == "bfloat16",
        fp16=settings.dtype == "float16",
        **recompute_arguments(settings.gradient_checkpointing),
        use_cpu=not torch.accelerator.is_available(),  # else bfloat16 is refused on a CPU
        logging_steps=settings.logging_steps,
        logging_nan_inf_filter=False,
        save_steps=settings.save_steps,
        save_total_limit=settings.save_total_limit,
        report_to=settings.report_to,
        seed=seed,
        data_seed=seed,
        disable_tqdm=not progress,
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def _tokens_per_step(windows: Dataset[Any] | IterableDataset[Any], settings: TrainingSettings) -> int:
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    if not isinstance(windows, IterableDataset) and len(windows) < per_step:  # type: ignore[arg-type]
        raise UserError(
            f"corpus too short: {len(windows)} windows of {settings.sequence_length} tokens, one step needs "  # type: ignore[arg-type]
            f"{per_step} (training.batch_size x gradient_accumulation_steps)"
        )
    return per_step * settings.sequence_length


def _run(trainer: CrosswaysTrainer, out_dir: Path, tokens_per_step: int) -> TrainedModel:
    device = trainer.args.device
    reset_peak_memory(device)
    checkpoint = get_last_checkpoint(str(out_dir)) if out_dir.exists() else None
    if checkpoint is not None and _finish(trainer, Path(checkpoint)):
        model = CrosswaysForCausalLM.from_pretrained(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
        model = trainer.accelerator.unwrap_model(trainer.model)
    steps = trainer.state.global_step
    # The log is part of every checkpoint, so speed and time survive an interruption.
    entries = [entry for entry in trainer.state.log_history if "step_seconds" in entry]
    step_seconds = [entry["step_seconds"] for entry in entries]
    return TrainedModel(
        model=model,
        curve=_curve(trainer.state.log_history, tokens_per_step),
        steps=steps,
        tokens=steps * tokens_per_step,
        tokens_per_second=tokens_per_step / statistics.median(step_seconds[1:] or step_seconds),
        wall_seconds=sum(entry["interval_seconds"] for entry in entries),
        peak_memory_bytes=peak_memory_bytes(device),
    )


def _finish(trainer: CrosswaysTrainer, checkpoint: Path) -> bool:
    """Whether the checkpoint is that of the last step; takes its log over if so.

    Resuming there would not do: `Trainer` takes one step more before it compares with `max_steps`.
    """
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    done = state.global_step >= trainer.args.max_steps
    if done:
        trainer.state = state
    return done


def _curve(history: list[dict[str, Any]], tokens_per_step: int) -> list[dict[str, Any]]:
    return [
        {
            "step": entry["step"],
            "tokens": entry["step"] * tokens_per_step,
            "loss": entry["lm_loss"],
            "auxiliary": {name: entry[name] for name in AUXILIARY_LOSSES if name in entry},
        }
        for entry in history
        if "lm_loss" in entry
    ]
