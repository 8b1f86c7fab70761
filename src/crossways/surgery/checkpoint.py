"""Any saved causal language model and its tokenizer, with its routing in sight."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from crossways.models import CrosswaysConfig
from crossways.surgery.find import UnknownRoutingError
from crossways.surgery.handle import CONFIG_KEY
from crossways.surgery.reroute import reroute
from crossways.surgery.sources import load_pretrained


def load_causal_lm(name: str | Path, **kwargs: Any) -> tuple[Any, PreTrainedTokenizerBase]:
    """A saved model and its tokenizer. A model of transformers that was saved rerouted is so again; one that was not
    keeps its own routing, with a handle on it if it is routed and understood, so that it can be measured.

    Args:
        name: folder, hub name, GGUF file or `package:NAME`, as for `load_pretrained`.
        **kwargs: for transformers' `from_pretrained`.

    Raises:
        UserError: when there is no such model.
    """
    model, tokenizer = load_pretrained(str(name), **{"dtype": None, **kwargs})
    if isinstance(model.config, CrosswaysConfig):
        return model, tokenizer
    if getattr(model.config, CONFIG_KEY, None) is not None:
        reroute(model)
        return model, tokenizer
    with suppress(UnknownRoutingError):  # dense, or not understood: it can be scored, only its routing is not seen
        reroute(model, "own")
    return model, tokenizer
