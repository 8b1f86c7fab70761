"""What a recipe says about training."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from crossways.settings import Settings


class TrainingSettings(Settings):
    """Optimisation of one model; handed to transformers' `TrainingArguments`. Defaults are LLaMA-like."""

    max_steps: int = Field(default=1000, ge=1)
    """Optimizer steps; 100 for a smoke test to 100,000 and more."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens per training window, up to the model's `max_position_embeddings`; 128 to 4096."""
    batch_size: int = Field(default=8, ge=1)
    """Windows per forward pass; as many as fit in memory."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step, 1 upwards; tokens per step = the product of these three."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Peak learning rate; 1e-4 (large) to 5e-3 (tiny models)."""
    warmup_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of the steps spent on linear warm-up; 0.01 to 0.1."""
    lr_scheduler: str = "cosine_with_min_lr"
    """Any schedule transformers knows: cosine_with_min_lr, linear, constant_with_warmup, warmup_stable_decay ..."""
    lr_scheduler_kwargs: dict[str, Any] = Field(default={"min_lr_rate": 0.1})
    """What the schedule takes; the default ends the cosine at a tenth of the peak."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """Decay of AdamW's first moment."""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """Decay of AdamW's second moment; 0.95 to 0.999."""
    weight_decay: float = Field(default=0.1, ge=0)
    """AdamW weight decay on matrices (not norms); 0 to 0.1."""
    max_grad_norm: float = Field(default=1.0, ge=0)
    """Gradient norm clip; 0 is off."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Compute dtype; the two 16-bit ones are automatic mixed precision with float32 weights (float16 needs a GPU)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between log entries (loss, each auxiliary loss, expert load)."""
    save_steps: int = Field(default=500, ge=1)
    """Steps between checkpoints that a killed run resumes from."""
    save_total_limit: int = Field(default=2, ge=1)
    """Checkpoints kept."""
    report_to: str = "tensorboard"
    """Any tracker of `Trainer(report_to=)`: tensorboard, wandb, mlflow, none ..."""
