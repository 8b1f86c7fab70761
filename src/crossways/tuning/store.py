"""What was measured, kept on disk by the hash of everything it depends on, so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from crossways.study.atomic import write_text_atomic
from crossways.surgery.handle import CONFIG_KEY

NO_MATTER = ("architectures", "dtype", "transformers_version", "_name_or_path", CONFIG_KEY)
"""Entries of a configuration that say nothing about what the model computes, or what the weights say themselves;
`save_pretrained` changes some."""


class Store:
    """A folder of JSON files, one per measurement."""

    def __init__(self, folder: Path, common: Mapping[str, Any]) -> None:
        """
        Args:
            folder: made when needed.
            common: what every measurement depends on, plain JSON.
        """
        self.folder, self.common = folder, dict(common)
        self.repeated = 0
        """Measurements that were found and not made again."""

    def get(self, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The kept value of `key`, or that of `measure()`, which is then kept. Both plain JSON."""
        full = {**self.common, **key}
        name = hashlib.sha256(json.dumps(full, sort_keys=True).encode()).hexdigest()[:24]
        path = self.folder / f"{name}.json"
        if path.is_file():
            self.repeated += 1
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        value = measure()
        write_text_atomic(path, json.dumps({"key": full, "value": value}) + "\n")
        return value


@torch.no_grad()
def model_digest(model: nn.Module) -> str:
    """Hexadecimal hash of a model's class, configuration and weights (of each its shape, sum and first numbers): what
    has changed enough to measure anew."""
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if config is not None else {}
    kept = {name: value for name, value in fields.items() if name not in NO_MATTER}
    seen = hashlib.sha256(f"{type(model).__name__} {json.dumps(kept, sort_keys=True, default=str)}".encode())
    for name, tensor in model.state_dict().items():
        first = tensor.flatten()[:64].float().tolist()
        seen.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {float(tensor.double().sum())!r} {first}".encode())
    return seen.hexdigest()[:16]
