"""What training starts from: fresh weights, or those of a saved model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from crossways.errors import UserError
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM

OWN_START = (".gates.", ".router.", "training_passes")
"""Parts of names that may be missing in, or left over from, the saved model: another routing starts afresh."""


def start_config(folder: Path) -> CrosswaysConfig:
    """The configuration of the saved model to start from; raises `UserError` when there is none of ours."""
    if not (folder / "config.json").is_file():
        raise UserError(
            f"init_from: {folder} holds no saved model (no config.json in it); `crossways upcycle` makes one"
        )
    try:
        config = CrosswaysConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"init_from: cannot read the configuration in {folder}: {error}") from error
    if config.model_type != CrosswaysConfig.model_type:
        raise UserError(f"init_from: {folder} holds a {config.model_type!r} model; `crossways upcycle` converts it")
    return config


def starting_model(config: CrosswaysConfig, init_from: Path | None) -> CrosswaysForCausalLM:
    """A model with fresh float32 weights, or with those of the one in `init_from`.

    Its routing may differ from the saved one: gates that are not in the folder are drawn, those no longer needed are
    left out. Everything else must be there with the same shapes.

    Raises:
        UserError: no model in the folder, or weights that do not fit the configuration.
    """
    if init_from is None:
        return CrosswaysForCausalLM(config)
    start_config(init_from)
    try:
        loaded: Any = CrosswaysForCausalLM.from_pretrained(
            init_from, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"init_from: the weights in {init_from} do not fit the model: {error}") from error
    model, told = loaded
    for what, names in (("lacks", told["missing_keys"]), ("has too much:", told["unexpected_keys"])):
        wrong = sorted(name for name in names if not any(part in name for part in OWN_START))
        if wrong:
            raise UserError(f"init_from: the model in {init_from} {what} {wrong[0]} ({len(wrong)} weights)")
    return model


def weights_digest(folder: Path) -> str:
    """Hexadecimal hash of a saved model's weights, so that a changed start is noticed."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
    return digest.hexdigest()
