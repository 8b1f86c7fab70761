"""A saved model and its tokenizer, from a folder."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.models import CrosswaysConfig, CrosswaysForCausalLM, register


def load_checkpoint(folder: Path) -> tuple[CrosswaysForCausalLM, PreTrainedTokenizerBase]:
    """A saved model and its tokenizer; raises `UserError` when the folder does not hold them."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no saved model: there is no config.json in it")
    register()
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model in {folder}: {error}") from error
    if not isinstance(model.config, CrosswaysConfig):
        raise UserError(f"{folder} holds a {model.config.model_type!r} model; only crossways' own can be read here")
    return model, tokenizer  # type: ignore[return-value]
