"""Any saved causal language model and its tokenizer, from a folder or a hub name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.models import CrosswaysConfig, register
from crossways.surgery.find import UnknownRoutingError
from crossways.surgery.handle import CONFIG_KEY
from crossways.surgery.reroute import reroute


def load_causal_lm(name: str | Path, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A saved model and its tokenizer. A model of transformers that was saved rerouted is so again; one that was not
    keeps its own routing, with a handle on it if it is routed and understood, so that it can be measured.

    Args:
        name: folder or hub name.
        **kwargs: for transformers' `from_pretrained`.

    Raises:
        UserError: when there is no such model.
    """
    register()
    folder = Path(name)
    if not folder.exists() and (folder.is_absolute() or str(name).startswith(".") or len(folder.parts) > 2):
        raise UserError(f"{name} holds no saved model: it does not exist")  # hub names have one slash at most
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{name} holds no saved model: there is no config.json in it")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {name}: {error}") from error
    if isinstance(model.config, CrosswaysConfig):
        return model, tokenizer
    if getattr(model.config, CONFIG_KEY, None) is not None:
        reroute(model)
        return model, tokenizer
    with suppress(UnknownRoutingError):  # dense, or not understood: it can be scored, only its routing is not seen
        reroute(model, "own")
    return model, tokenizer
