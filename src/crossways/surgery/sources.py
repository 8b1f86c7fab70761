"""Where a pretrained model comes from: a folder, a hub's name, a GGUF file, or a package that ships one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from crossways.errors import UserError
from crossways.hub import loading_options
from crossways.models import register

PACKAGE = "package:"


def load_pretrained(
    model: str, gguf: str | None = None, dtype: torch.dtype | None = torch.float32, **kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, both from the same place.

    Args:
        model: a folder, the name of a hub's model, a GGUF file, or `package:NAME` for the one GGUF file inside an
            installed Python package.
        gguf: name of a GGUF file in `model`, which needs the package `gguf`.
        dtype: of the weights; None as saved. Quantised GGUF weights are unpacked to it, for None to float32.
        **kwargs: for transformers' `from_pretrained` of the model.

    Raises:
        UserError: nothing there, several GGUF files, or something transformers cannot load.
    """
    place, file = locate(model, gguf)
    options = _options(place, file)
    register()
    if dtype is not None or file is not None:
        kwargs["dtype"] = dtype or torch.float32
    try:
        loaded = AutoModelForCausalLM.from_pretrained(place, **options, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the model {model}: {error}") from error
    if file is not None:
        loaded.config.quantization_config = None  # the weights are no longer quantised
    return loaded, tokenizer


def _options(place: str, file: str | None) -> dict[str, Any]:
    """What model and tokenizer are both loaded with."""
    if file is None:
        if Path(place).is_dir() and not Path(place, "config.json").is_file():
            raise UserError(f"{place} holds no saved model: there is no config.json in it")
        return loading_options(place)
    if find_spec("gguf") is None:
        raise UserError("reading a GGUF file needs the package gguf: pip install 'crossways[pretrained]'")
    return {"gguf_file": file, **loading_options(place, file)}


def locate(model: str, gguf: str | None = None) -> tuple[str, str | None]:
    """The folder or hub name, and the GGUF file in it if there is to be one.

    Raises:
        UserError: no such package, no GGUF file in it, or several.
    """
    if model.startswith(PACKAGE):
        folder = _package_folder(model.removeprefix(PACKAGE))
        return str(folder), gguf or _only_gguf(folder)
    path = Path(model)
    if path.suffix == ".gguf":
        if gguf is not None or not path.is_file():
            raise UserError(f"{model}: " + ("--gguf is not needed for a file" if path.is_file() else "no such file"))
        return str(path.parent), path.name
    if gguf is not None and path.is_dir() and not (path / gguf).is_file():
        raise UserError(f"{path / gguf}: no such file")
    return model, gguf


def _package_folder(name: str) -> Path:
    found = find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise UserError(f"no installed package {name!r}; for SmolLM2: make pretrained")
    return Path(next(iter(found.submodule_search_locations)))


def _only_gguf(folder: Path) -> str:
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if len(files) != 1:
        what = f"{len(files)} GGUF files {files}; name one by --gguf" if files else "no GGUF file, so no model"
        raise UserError(f"{folder} holds {what}")
    return files[0]
