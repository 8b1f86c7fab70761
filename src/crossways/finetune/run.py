"""Fine-tune one model under one rule on one set of examples, by TRL's `SFTTrainer`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from pydantic import Field
from transformers import PreTrainedTokenizerBase, set_seed

from crossways.errors import UserError
from crossways.evaluation.evaluate import leak_reason_of, rule_of
from crossways.finetune.examples import Example
from crossways.finetune.scoring import score_answers
from crossways.finetune.settings import FinetuneRecipe, LoraSettings, RuleSettings
from crossways.settings import Settings
from crossways.study.atomic import write_text_atomic
from crossways.surgery.checkpoint import load_causal_lm
from crossways.surgery.handle import handle_of
from crossways.surgery.reroute import reroute
from crossways.training.recompute import recompute_arguments


class Figure(Settings):
    """Perplexity of one set of answers."""

    perplexity: float
    """Per token, under the rule that trained."""
    causal_perplexity: float | None = None
    """Under its decode twin, for rules that look around; None for the others."""
    experts_per_token: float | None = None
    """Mean executed experts per token and routed layer, under the rule."""


class FinetuneRecord(Settings):
    """What one run gave."""

    rule: str
    """Name in the recipe."""
    trained_on: str
    """`clean` or `corrupted`."""
    seed: int
    description: str
    """The routing in words."""
    leaky: bool
    """Whether the plain figures may flatter."""
    leak_reason: str = ""
    settings: dict[str, Any]
    """The recipe's part that decided this run."""
    before: dict[str, Figure]
    """Rerouted, before fine-tuning: `clean` and `corrupted` validation answers."""
    after: dict[str, Figure]
    """After it: `train` (the first answers it was trained on, as many as are validated), `clean`, `corrupted`."""
    train_loss: list[tuple[int, float]] = Field(default=[])
    """Step and loss of each log entry."""
    trainable_parameters: int
    seconds: float
    """Wall time of training."""


def finetune_one(
    recipe: FinetuneRecipe,
    rule_name: str,
    trained_on: str,
    seed: int,
    data: Mapping[str, Sequence[Example]],
    out: Path,
    *,
    progress: bool = True,
) -> FinetuneRecord:
    """Fine-tune and score once.

    Args:
        recipe: everything.
        rule_name: one of its rules.
        trained_on: `clean` or `corrupted`.
        seed: of data order and adapters.
        data: examples under `train` (as they are to be trained on), `clean` and `corrupted` (validation).
        out: folder for the model.
        progress: show a progress bar.

    Raises:
        UserError: a model that is not there or not understood, no answer short enough, TRL not installed.
    """
    set_seed(seed)
    model, tokenizer = load_causal_lm(recipe.model)
    _reroute(model, recipe.rules[rule_name])
    scored = {name: data[name] for name in ("clean", "corrupted")}
    before = {name: _figure(recipe, model, tokenizer, examples) for name, examples in scored.items()}
    trainer = _trainer(recipe, model, tokenizer, data["train"], out, seed, progress=progress)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    model = trainer.model
    scored = {"train": data["train"][: len(data["clean"])], **scored}
    after = {name: _figure(recipe, model, tokenizer, examples) for name, examples in scored.items()}
    if recipe.save_models:
        _save(model, tokenizer, out / "model")
    reason = leak_reason_of(model)
    return FinetuneRecord(
        rule=rule_name,
        trained_on=trained_on,
        seed=seed,
        description=rule_of(model),
        leaky=bool(reason),
        leak_reason=reason,
        settings=run_settings(recipe, rule_name, trained_on, seed),
        before=before,
        after=after,
        train_loss=[(e["step"], e["loss"]) for e in trainer.state.log_history if "loss" in e],
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        seconds=seconds,
    )


def run_settings(recipe: FinetuneRecipe, rule_name: str, trained_on: str, seed: int) -> dict[str, Any]:
    """What decides a run, for telling a finished one from one made with other settings."""
    kept = recipe.model_dump(mode="json", exclude={"title", "rules", "seeds", "train_on", "save_models"})
    rule = recipe.rules[rule_name].model_dump(mode="json")
    return json.loads(json.dumps({**kept, "rule": rule, "trained_on": trained_on, "seed": seed}))


def write_record(record: FinetuneRecord, folder: Path) -> None:
    """As `record.json`, whole or not at all."""
    write_text_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")


def _reroute(model: Any, rule: RuleSettings) -> None:
    attached = handle_of(model)
    if attached is None and not hasattr(model.config, "causal_routing"):
        raise UserError(f"{type(model).__name__} is not routed, or its routing is not understood")
    if attached is not None:
        attached.undo()
    reroute(model, rule.rule, **rule.model_dump(exclude={"rule"}))


def _figure(
    recipe: FinetuneRecipe, model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]
) -> Figure:
    score = partial(
        score_answers,
        model,
        tokenizer,
        examples,
        max_length=recipe.tuning.max_length,
        batch_size=recipe.evaluation_batch_size,
    )
    plain = score()
    twin = None
    if leak_reason_of(model) and _estimated(model):
        twin = score(causal=True).perplexity
    return Figure(perplexity=plain.perplexity, causal_perplexity=twin, experts_per_token=plain.budget)


def _estimated(model: Any) -> bool:
    """Whether the decode twins know their cutoffs; before the first training step they do not."""
    handle = handle_of(model)
    return handle is not None and all(handle.estimates())


def _trainer(
    recipe: FinetuneRecipe,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    out: Path,
    seed: int,
    *,
    progress: bool,
) -> Any:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise UserError("fine-tuning needs TRL: pip install 'crossways[finetune]'") from error
    tuning = recipe.tuning
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    arguments = SFTConfig(
        output_dir=str(out),  # it is made, and nothing is written to it
        max_steps=tuning.max_steps,
        per_device_train_batch_size=tuning.batch_size,
        gradient_accumulation_steps=tuning.gradient_accumulation_steps,
        learning_rate=tuning.learning_rate,
        lr_scheduler_type=tuning.lr_scheduler,
        warmup_steps=round(tuning.warmup_fraction * tuning.max_steps),
        max_length=tuning.max_length,
        completion_only_loss=True,
        bf16=tuning.dtype == "bfloat16",
        **recompute_arguments(tuning.gradient_checkpointing),
        use_cpu=not torch.accelerator.is_available(),
        logging_steps=tuning.logging_steps,
        save_strategy="no",
        report_to="none",
        seed=seed,
        data_seed=seed,
        disable_tqdm=not progress,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in examples]
    return SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if recipe.lora is None else _adapters(recipe.lora),
    )


def _adapters(lora: LoraSettings) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        target_parameters=lora.target_parameters,
        task_type="CAUSAL_LM",
    )


def _save(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """The model as one that transformers loads, adapters merged, the rule in its configuration."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
