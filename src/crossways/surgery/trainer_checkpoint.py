"""Checkpoints that transformers' `Trainer` can resume: it loads the tensors of a file into the model that it has,
each by its name there, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KEY = "crossways_routing"
"""Name of the tensor that holds the estimates of the decode twins."""

Estimates = list[dict[str, list[float]]]
"""As `Handle.estimates` makes them."""


def is_trainers(folder: Any) -> bool:
    """Whether a folder is one that `Trainer` resumes from, by its name: checkpoint-100."""
    return isinstance(folder, str | Path) and re.fullmatch(r"checkpoint-\d+", Path(folder).name) is not None


def settings(model: nn.Module, estimates: Estimates, given: Mapping[str, Any]) -> dict[str, Any]:
    """For `save_pretrained`: the estimates, if there are any, as one more tensor; and weights by the names and in the
    shapes that they have in the model, since `Trainer` (5.23) does not stack experts that were written one by one.

    Args:
        model: is saved.
        estimates: of its decode twins.
        given: what `save_pretrained` was called with.
    """
    changed: dict[str, Any] = {"save_original_format": False}
    if any(estimates):
        state = given.get("state_dict")
        changed["state_dict"] = {**(model.state_dict() if state is None else state), KEY: as_tensor(estimates)}
    return changed


def as_tensor(estimates: Estimates) -> Tensor:
    """The estimates as JSON in bytes, uint8."""
    return torch.tensor(list(json.dumps(estimates).encode()), dtype=torch.uint8)


def from_tensor(packed: Tensor) -> Estimates:
    """The reverse."""
    estimates: Estimates = json.loads(bytes(packed.tolist()))
    return estimates
