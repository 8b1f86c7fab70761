"""Recomputing activations in backward instead of keeping them: less memory, more time."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainingArguments


def recompute_arguments(on: bool) -> dict[str, Any]:
    """The arguments of `TrainingArguments`, or of a subclass, that turn recomputation on or off.

    transformers 5.2x renames `gradient_checkpointing`, warning of the old name; both mean the same.
    """
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if on else {name: False}
