"""`Recipe`: everything a study says, typed and closed. `load` reads one, `resolve` makes models of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from crossways.evaluation.settings import EvaluationSettings
from crossways.rules.registry import nearest
from crossways.settings import Settings
from crossways.study.partial import ModelFields, TrainingOverrides
from crossways.study.record import Comparison
from crossways.training.corpus import CorpusSettings
from crossways.training.settings import TrainingSettings
from crossways.training.tokenizer import TokenizerSettings

Quantity = Literal["total", "active"]
Knob = Literal["intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"]
# A variant names a folder, and is a part of dotted keys.
VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class MatchSettings(Settings):
    """How variants are brought to equal size."""

    reference: str | None = None
    """The variant whose widths are taken as they are and whose size the others are given; None matches nothing."""
    tolerance: float = Field(default=0.01, gt=0, lt=1)
    """Greatest relative difference in each matched quantity, 0 to 1; 0.01 is the customary 1 %."""
    multiple_of: int = Field(default=8, ge=1)
    """Solved widths are multiples of this where the tolerance allows, else of its half and so on; 1 to 128."""


class VariantMatch(Settings):
    """How one variant is matched."""

    quantities: tuple[Quantity, ...] | None = None
    """What is made equal; by default total and active, for a dense model active alone; [] leaves it as declared."""
    knobs: tuple[Knob, ...] | None = Field(default=None, min_length=1)
    """The widths solved for; by default those of routed and shared experts, for a dense model `intermediate_size`."""


class Variant(Settings):
    """One model of a study: what it has different from the recipe's `model` and `training`."""

    label: str = ""
    """Name for readers; the variant's key if empty."""
    description: str = ""
    """One sentence on what it is."""
    model: ModelFields = ModelFields()
    """Configuration fields that differ; a rule (`score`, `select`, `sharing`) is replaced whole."""
    init_from: str | None = None
    """Another start than the recipe's `init_from`."""
    training: TrainingOverrides = TrainingOverrides()
    """Training settings that differ."""
    match: VariantMatch = VariantMatch()
    """How its size is matched."""


class Recipe(Settings):
    """A study: variants x seeds on one corpus under one protocol."""

    title: str
    """Heading of the report."""
    description: str = ""
    """What the study is; blank lines part paragraphs."""
    notice: str = ""
    """What a reader must not conclude, shown before everything else."""
    corpus: CorpusSettings = CorpusSettings()
    """The text."""
    split_seed: int = Field(default=0, ge=0)
    """Seed of the split into training and validation documents, the same for every run."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """A trained or a named tokenizer."""
    model: ModelFields = ModelFields()
    """`CrosswaysConfig` fields that all variants have in common; `vocab_size` follows from the tokenizer."""
    init_from: str | None = None
    """Folder of a saved model to start training from, such as `crossways upcycle` writes; its configuration holds
    where `model` says nothing, and its widths are never solved for. None draws fresh weights. Name its tokenizer too
    (`tokenizer.name`)."""
    training: TrainingSettings = TrainingSettings()
    """Optimisation."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """The perplexity protocol."""
    match: MatchSettings = MatchSettings()
    """How variants are brought to equal size."""
    variants: dict[VariantName, Variant] = Field(min_length=1)
    """The models compared, by name, in the order of the table."""
    comparisons: tuple[Comparison, ...] = ()
    """Questions the report answers, each from some of the variants."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Seeds of initialisation and data order; three or more give a spread worth the name."""
    workers: int = Field(default=1, ge=1)
    """Runs trained at once, each in a process of its own; at most the cores of the machine."""
    threads: int | None = Field(default=None, ge=1)
    """Torch threads of each run; None divides the cores among the workers."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds must differ, got {list(seeds)}")
        return seeds

    def start_of(self, variant: str) -> str | None:
        """The folder that a variant starts from, or None."""
        return self.variants[variant].init_from or self.init_from

    @model_validator(mode="after")
    def _starts_have_a_tokenizer(self) -> Recipe:
        started = [name for name in self.variants if self.start_of(name)]
        if started and self.tokenizer.name is None:
            raise ValueError(
                f"variants.{started[0]} starts from {self.start_of(started[0])}, which no new tokenizer fits; "
                "set tokenizer.name, for instance to the same folder"
            )
        return self

    @model_validator(mode="after")
    def _names_exist(self) -> Recipe:
        named: dict[str, tuple[str, ...]] = {}
        if self.match.reference is not None:
            named["match.reference"] = (self.match.reference,)
        for i, comparison in enumerate(self.comparisons):
            named[f"comparisons.{i}.variants"] = comparison.variants
            named[f"comparisons.{i}.baseline"] = (comparison.baseline,)
        for key, names in named.items():
            for name in names:
                require_variant(name, self.variants, key)
        return self


def require_variant(name: str, variants: Mapping[str, Variant], key: str) -> None:
    """Raise `ValueError` that names the nearest variant when there is none of this name."""
    if name not in variants:
        known = list(variants)
        raise ValueError(f"{key} names no variant: {name!r}{nearest(name, known)}; known: {', '.join(known)}")
