"""One run from its settings to its record; the same in this process and in a worker."""

from __future__ import annotations

import json
import os
import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from crossways.evaluation.cost import count_parameters, training_flops_per_token
from crossways.evaluation.evaluate import evaluate_model
from crossways.evaluation.settings import EvaluationSettings
from crossways.models import CrosswaysConfig
from crossways.study.atomic import write_text_atomic
from crossways.study.plan import Run
from crossways.study.record import CurvePoint, Parameters, RunRecord, Training
from crossways.training.corpus import Corpus, CorpusSettings, load_corpus
from crossways.training.run import TrainedModel, train_model
from crossways.training.settings import TrainingSettings
from crossways.training.tokenizer import TokenizerSettings, load_tokenizer


def execute(run: Run, cache_dir: Path, *, progress: bool = True) -> RunRecord:
    """Train, save, evaluate and record one run, going on from its newest checkpoint.

    The record is written last and whole: where there is one, the run is finished. Checkpoints are then deleted.

    Args:
        run: what to do and where.
        cache_dir: for the tokenizer and tokenised text, shared by the runs of a study.
        progress: show the trainer's progress bar.

    Raises:
        UserError: as `load_corpus`, `train_model` and `evaluate_model` do, a loss that is not finite among them.
    """
    corpus, tokenizer = load_text(run, cache_dir)
    training = TrainingSettings(**run.settings["training"], **run.operational)
    config = run_config(run, tokenizer)
    checkpoints = run.folder / "trainer"
    start = run.settings.get("init_from")
    trained = train_model(
        config,
        corpus,
        tokenizer,
        training,
        checkpoints,
        run.seed,
        cache_dir=cache_dir,
        init_from=Path(start["folder"]) if start else None,
        progress=progress,
    )
    save_model(trained, tokenizer, run.folder / "model")
    settings = EvaluationSettings(**run.settings["evaluation"])
    evaluated = evaluate_model(trained.model.eval(), tokenizer, corpus, settings, cache_dir)
    record = RunRecord(
        variant=run.variant,
        label=run.label,
        seed=run.seed,
        description=run.description,
        parameters=_parameters(config),
        training_flops_per_token=training_flops_per_token(config, training.sequence_length),
        training=_training(trained, training),
        curve=tuple(CurvePoint(**point) for point in trained.curve),
        evaluation=evaluated.evaluation,
        load_imbalance=evaluated.load_imbalance,
        expert_load=evaluated.expert_load,
        environment=environment(),
        recipe_digest=run.digest,
    )
    record.save(run.record_path)
    for checkpoint in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return record


def load_text(run: Run, cache_dir: Path, corpus: Corpus | None = None) -> tuple[Corpus, PreTrainedTokenizerBase]:
    """The corpus, unless it is given, and the tokenizer of a run."""
    if corpus is None:
        fields = {key: value for key, value in run.settings["corpus"].items() if key != "content"}
        corpus = load_corpus(CorpusSettings(**fields), run.settings["split_seed"])
    return corpus, load_tokenizer(TokenizerSettings(**run.settings["tokenizer"]), corpus, cache_dir)


def run_config(run: Run, tokenizer: PreTrainedTokenizerBase) -> CrosswaysConfig:
    """The model's configuration, with the tokenizer's special tokens."""
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CrosswaysConfig(**run.settings["model"], **ids)


def save_model(trained: TrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer as transformers does, the whole folder or nothing."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    trained.model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


def environment() -> dict[str, str]:
    """Versions, processor, threads and date."""
    return {
        "crossways": _version("crossways"),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": str(torch.get_num_threads()),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def processor() -> str:
    """The processor's name, as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_settings(run: Run) -> None:
    """Make the run's folder and say in it what it is made with."""
    write_text_atomic(run.settings_path, json.dumps(run.settings, indent=1, sort_keys=True) + "\n")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        import crossways

        return crossways.__version__ if package == "crossways" else "unknown"


def _parameters(config: CrosswaysConfig) -> Parameters:
    counts = count_parameters(config)
    return Parameters(total=counts.total, active=counts.active, router=counts.router)


def _training(trained: TrainedModel, settings: TrainingSettings) -> Training:
    measured: dict[str, Any] = {
        name: getattr(trained, name)
        for name in ("steps", "tokens", "tokens_per_second", "wall_seconds", "peak_memory_bytes")
    }
    return Training(**measured, learning_rate=settings.learning_rate, dtype=settings.dtype)
