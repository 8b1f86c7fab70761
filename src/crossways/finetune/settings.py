"""What a fine-tuning recipe says."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from crossways.settings import Settings


class RuleSettings(Settings):
    """One routing rule to fine-tune under; what is not given stays as the model has it."""

    rule: str | None = None
    """A preset of `crossways reroute --list`."""
    select: dict[str, Any] | None = None
    """A selection by its fields."""
    score: dict[str, Any] | None = None
    """A score by its fields."""
    k: float | list[float] | None = None
    """Mean experts per token, one number or one per routed layer."""
    renormalize: bool | None = None
    """Whether each token's weights sum to one."""


class ExampleSettings(Settings):
    """Which instructions and answers to learn from."""

    source: str = Field(default="stdlib-docstrings", min_length=1)
    """`stdlib-docstrings` (functions of Python's own library and their docstrings), a JSON or JSONL file, or the name
    of a Hugging Face data set; the last two with the fields of Alpaca: instruction, input (may be empty), output."""
    max_examples: int | None = Field(default=None, ge=4)
    """Most examples, training and validation together; None for all."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the examples held out; at least one. 0.02 to 0.2."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the split."""


class CorruptionSettings(Settings):
    """How data are spoilt. USMoE (arXiv 2503.22996, figure 5) does not say how, as far as could be found."""

    kind: Literal["replace_words", "swap_outputs", "typos"] = "replace_words"
    """`replace_words`: each word of instruction and output becomes a random word of the same data with probability
    `rate`. `swap_outputs`: a share `rate` of the examples trade outputs. `typos`: each letter becomes a random letter
    with probability `rate`."""
    rate: float = Field(default=0.2, ge=0, le=1)
    """Probability or share; 0.05 to 0.5."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is spoilt; training and validation examples differ anyway."""


class LoraSettings(Settings):
    """Low-rank adapters instead of all weights (PEFT)."""

    r: int = Field(default=16, ge=1)
    """Rank; 4 to 64."""
    alpha: float = Field(default=32, gt=0)
    """Scale; usually r to 2 r."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on the adapters' input."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get one, as in PEFT; `all-linear` takes attention and shared experts, not stacked experts."""
    target_parameters: list[str] | None = None
    """Parameters that get one, e.g. [mlp.experts.gate_up_proj, mlp.experts.down_proj]; needs dropout 0."""


class TuningSettings(Settings):
    """Optimisation; handed to TRL's `SFTConfig`."""

    max_steps: int = Field(default=2000, ge=1)
    """Optimizer steps; 2000 in USMoE's experiment."""
    batch_size: int = Field(default=8, ge=1)
    """Examples per forward pass."""
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    """Forward passes per optimizer step."""
    learning_rate: float = Field(default=2e-5, gt=0)
    """Peak; 1e-5 to 5e-5 for all weights, about ten times that for adapters."""
    warmup_fraction: float = Field(default=0.03, ge=0, le=1)
    """Share of the steps spent on linear warm-up."""
    lr_scheduler: str = "cosine"
    """Any schedule transformers knows."""
    max_length: int = Field(default=512, ge=8)
    """Tokens per example; longer ones are cut at the end."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype of training, weights float32."""
    gradient_checkpointing: bool = False
    """Recompute activations: less memory, more time."""
    logging_steps: int = Field(default=10, ge=1)
    """Steps between log entries."""


class FinetuneRecipe(Settings):
    """Every rule x clean and corrupted training data x every seed."""

    title: str = Field(min_length=1)
    """One line."""
    model: str = Field(min_length=1)
    """Folder or hub name of a routed model of transformers."""
    rules: dict[str, RuleSettings] = Field(min_length=1)
    """Routing rules by name."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Seeds of data order and adapters."""
    examples: ExampleSettings = ExampleSettings()
    """The data."""
    corruption: CorruptionSettings = CorruptionSettings()
    """How they are spoilt for the corrupted runs and the corrupted figure."""
    train_on: list[Literal["clean", "corrupted"]] = Field(default=["clean", "corrupted"], min_length=1)
    """Which data to fine-tune on."""
    lora: LoraSettings | None = None
    """Adapters; None fine-tunes all weights."""
    tuning: TuningSettings = TuningSettings()
    """Optimisation."""
    evaluation_batch_size: int = Field(default=16, ge=1)
    """Examples per forward pass when scoring."""
    save_models: bool = True
    """Keep each fine-tuned model (adapters merged) in RULE/DATA/seed-SEED/model."""
