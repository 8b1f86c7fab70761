"""Settings of which any part may be given: what a recipe's `model` and a variant's overrides are typed by."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import create_model
from transformers import LlamaConfig

from crossways.models.fields import RoutingFields
from crossways.settings import Settings
from crossways.training.settings import TrainingSettings


def partial(name: str, types: Mapping[str, Any]) -> type[Settings]:
    """A settings class in which every field may be left out; `model_dump(exclude_unset=True)` is what was given."""
    fields: dict[str, Any] = {field: (kind, None) for field, kind in types.items()}
    return create_model(name, __base__=Settings, **fields)


def model_field_types() -> dict[str, Any]:
    """The fields of `CrosswaysConfig` a recipe may set: the architecture's, not those a run finds out by itself."""
    hints = typing.get_type_hints(RoutingFields, localns={"torch": torch})
    own = [name for cls in (LlamaConfig, RoutingFields) for name in vars(cls)["__annotations__"]]
    left_out = {"use_cache", "pretraining_tp", "pad_token_id", "bos_token_id", "eos_token_id", "model_type"}
    types = {name: hints[name] for name in own if name in hints and name not in left_out}
    # transformers types it as a TypedDict that pydantic cannot read on Python 3.11.
    return types | {"rope_parameters": dict[str, Any] | None}


def training_field_types() -> dict[str, Any]:
    """The fields of `TrainingSettings` with their bounds."""
    return {
        name: Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
        for name, info in TrainingSettings.model_fields.items()
    }


if TYPE_CHECKING:

    class ModelFields(Settings):
        """Fields of `CrosswaysConfig`."""

    class TrainingOverrides(Settings):
        """Fields of `TrainingSettings`."""
else:
    ModelFields = partial("ModelFields", model_field_types())
    TrainingOverrides = partial("TrainingOverrides", training_field_types())
