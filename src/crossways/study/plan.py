"""What a study has to do: one `Run` per variant and seed, each with its folder, its settings and their digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossways.errors import UserError
from crossways.study.recipe import Recipe
from crossways.study.resolve import ResolvedVariant
from crossways.training.start import weights_digest

# These change when and where things are written, not what comes out.
WITHOUT_EFFECT = ("save_steps", "save_total_limit", "report_to")


@dataclass(frozen=True)
class Run:
    """One variant with one seed, as plain data that another process can read."""

    variant: str
    """Key of the variant."""
    label: str
    """Its name for readers."""
    description: str
    """What it is."""
    seed: int
    """Of initialisation and data order."""
    settings: dict[str, Any]
    """Everything that decides the result, as JSON: text, model, training, evaluation and seed."""
    operational: dict[str, Any]
    """The training settings that do not: when to write checkpoints, and to which tracker."""
    folder: Path
    """Where everything of this run goes."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.variant} seed {self.seed}"

    @property
    def digest(self) -> str:
        """Hexadecimal hash of `settings`."""
        return hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()

    @property
    def record_path(self) -> Path:
        """The record, which exists exactly when the run is finished."""
        return self.folder / "record.json"

    @property
    def settings_path(self) -> Path:
        """The settings the folder was made with."""
        return self.folder / "settings.json"


def run_folder(out: Path, variant: str, seed: int) -> Path:
    """Where a run of a study stands."""
    return out / variant / f"seed-{seed}"


def plan_runs(
    recipe: Recipe, variants: Mapping[str, ResolvedVariant], seeds: Sequence[int], corpus_digest: str, out: Path
) -> list[Run]:
    """All runs, seed by seed, so that a study stopped early has every variant.

    Args:
        recipe: the study.
        variants: what to train of it.
        seeds: with which seeds.
        corpus_digest: identifies the documents, so that a changed corpus is noticed.
        out: the study's folder.
    """
    common = {
        "corpus": {**recipe.corpus.model_dump(mode="json"), "content": corpus_digest},
        "split_seed": recipe.split_seed,
        "tokenizer": recipe.tokenizer.model_dump(mode="json"),
        "evaluation": recipe.evaluation.model_dump(mode="json"),
    }
    return [_run(common, variant, seed, out) for seed in seeds for variant in variants.values()]


def _run(common: Mapping[str, Any], variant: ResolvedVariant, seed: int, out: Path) -> Run:
    training = variant.training.model_dump(mode="json")
    operational = {key: training.pop(key) for key in WITHOUT_EFFECT}
    settings = {**common, "model": dict(variant.model), "training": training, "seed": seed}
    if variant.init_from is not None:
        settings["init_from"] = {"folder": variant.init_from, "weights": weights_digest(Path(variant.init_from))}
    return Run(
        variant=variant.name,
        label=variant.label,
        description=variant.description,
        seed=seed,
        settings=settings,
        operational=operational,
        folder=run_folder(out, variant.name, seed),
    )


def changed_keys(run: Run) -> list[str]:
    """How the run's folder, if it exists, differs from the run: `key was X and is Y`, one entry per key."""
    if not run.settings_path.exists():
        return []
    try:
        before = json.loads(run.settings_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{run.settings_path} is not readable ({error}); delete the folder to repeat the run"
        ) from error
    old, new = _flat(before), _flat(json.loads(json.dumps(run.settings)))
    return [
        f"{key} was {old.get(key, 'not set')!r} and is {new.get(key, 'not set')!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    return {
        key: leaf
        for name, inner in value.items()
        for key, leaf in _flat(inner, f"{prefix}.{name}" if prefix else str(name)).items()
    }
