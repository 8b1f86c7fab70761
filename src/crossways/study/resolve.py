"""From a recipe to the models it means: overrides merged, widths solved, parameters and operations counted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from crossways.errors import UserError
from crossways.evaluation.cost import ParameterCounts, count_parameters, training_flops_per_token
from crossways.models import CrosswaysConfig
from crossways.study.load import validated
from crossways.study.match import Target, solve_widths
from crossways.study.partial import model_field_types
from crossways.study.recipe import Knob, Quantity, Recipe
from crossways.training.settings import TrainingSettings
from crossways.training.start import start_config
from crossways.training.tokenizer import load_named


@dataclass(frozen=True)
class ResolvedVariant:
    """One variant with nothing left open."""

    name: str
    """Its key in the recipe."""
    label: str
    """Its name for readers."""
    description: str
    """One sentence on what it is, may be empty."""
    model: Mapping[str, Any]
    """`CrosswaysConfig` fields, widths solved."""
    training: TrainingSettings
    """How it is trained."""
    parameters: ParameterCounts
    """Its size."""
    training_flops_per_token: float
    """Operations per training token at `training.sequence_length`."""
    init_from: str | None = None
    """Folder of the saved model it starts from."""

    def config(self, **fields: Any) -> CrosswaysConfig:
        """The model's configuration, with further fields such as token ids."""
        return CrosswaysConfig(**{**self.model, **fields})


def resolve(recipe: Recipe) -> dict[str, ResolvedVariant]:
    """All variants by name, in the recipe's order.

    Raises:
        UserError: one line that names the variant, for an impossible model or a size that cannot be matched.
    """
    vocab_size, common = _vocab_size(recipe), recipe.model.model_dump(exclude_unset=True)
    models = {
        name: {**_start(recipe.start_of(name), vocab_size), **common, **v.model.model_dump(exclude_unset=True)}
        for name, v in recipe.variants.items()
    }
    for name, model in models.items():
        build_config(name, model)
    reference = recipe.match.reference
    if reference is not None:
        size = counts(reference, models[reference])
        models = {
            name: model if name == reference else model | _solved(recipe, name, model, size)
            for name, model in models.items()
        }
    return {name: _finish(recipe, name, model) for name, model in models.items()}


def build_config(name: str, model: Mapping[str, Any]) -> CrosswaysConfig:
    """The configuration of a variant; raises `UserError` that names the variant and what does not fit."""
    try:
        return CrosswaysConfig(**model)
    except (StrictDataclassError, ValueError, TypeError) as error:
        cause: BaseException = error
        while isinstance(cause, StrictDataclassError) and cause.__cause__ is not None:
            cause = cause.__cause__
        raise UserError(f"variants.{name}.model: {cause}") from error


def counts(name: str, model: Mapping[str, Any]) -> ParameterCounts:
    """Parameter counts of a variant."""
    try:
        return count_parameters(build_config(name, model))
    except UserError as error:
        raise UserError(f"variants.{name}: {error}".replace(f"variants.{name}: variants.", "variants.")) from error


def _start(folder: str | None, vocab_size: int) -> dict[str, Any]:
    """Fields that hold where the recipe says nothing: of a fresh model the vocabulary, of a saved one all."""
    if folder is None:
        return {"vocab_size": vocab_size}
    config = start_config(Path(folder))
    if config.vocab_size < vocab_size:
        raise UserError(f"the tokenizer has {vocab_size} tokens, the model in {folder} {config.vocab_size}")
    return {name: value for name, value in config.to_dict().items() if name in model_field_types()}


def _vocab_size(recipe: Recipe) -> int:
    """The vocabulary the models are built for: a trained tokenizer may leave a few of the last rows unused."""
    if recipe.tokenizer.name is None:
        return recipe.tokenizer.vocab_size
    return len(load_named(recipe.tokenizer.name))


def _solved(recipe: Recipe, name: str, model: Mapping[str, Any], size: ParameterCounts) -> dict[Knob, int]:
    config, asked = build_config(name, model), recipe.variants[name].match
    routed = bool(config.routed_layers)
    quantities: tuple[Quantity, ...] = ("total", "active") if routed else ("active",)
    knobs: tuple[Knob, ...] = (
        ("moe_intermediate_size", "shared_expert_intermediate_size") if routed else ("intermediate_size",)
    )
    quantities = quantities if asked.quantities is None else asked.quantities
    knobs = asked.knobs or knobs
    if not quantities or recipe.start_of(name):
        return {}
    target = Target(str(recipe.match.reference), size, quantities)
    widths: dict[Knob, int] = {knob: getattr(config, knob) for knob in knobs}
    return solve_widths(name, lambda found: counts(name, dict(model) | dict(found)), widths, target, recipe.match)


def _finish(recipe: Recipe, name: str, model: Mapping[str, Any]) -> ResolvedVariant:
    variant, config = recipe.variants[name], build_config(name, model)
    overrides = variant.training.model_dump(exclude_unset=True)
    training = validated(TrainingSettings, {**recipe.training.model_dump(), **overrides}, f"variants.{name}.training")
    for key, length in (
        ("training.sequence_length", training.sequence_length),
        ("evaluation.window", recipe.evaluation.window),
    ):
        if length > config.max_position_embeddings:
            raise UserError(
                f"{key} = {length} exceeds the context of variant {name!r}; raise model.max_position_embeddings "
                f"(now {config.max_position_embeddings})"
            )
    return ResolvedVariant(
        name=name,
        label=variant.label or name,
        description=variant.description,
        model=model,
        training=training,
        parameters=counts(name, model),
        training_flops_per_token=training_flops_per_token(config, training.sequence_length),
        init_from=recipe.start_of(name),
    )
