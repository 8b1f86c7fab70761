"""What the Hugging Face hub says about a name, asked once. The libraries that load from it ask several times with
pauses between, which offline is a minute of waiting before a mistyped name is told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from crossways.errors import UserError
from crossways.rules.registry import nearest

SECONDS = 10.0
"""To wait for an answer."""

Answer = Literal["there", "absent", "silent"]
"""Whether the hub has something of a name; `silent` when it cannot be reached, or may not be (offline mode)."""


def ask_hub(name: str, kind: Literal["model", "dataset"]) -> Answer:
    """Whether the hub has a model or a dataset of this name that the user may see.

    An answer that says neither, such as an overloaded server's, is `there`: the library that loads asks again.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=SECONDS)
    except HFValidationError:
        return "absent"
    except HfHubHTTPError as error:
        unknown = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
        return "absent" if unknown else "there"
    except Exception:  # the network's exceptions have no common base, and are others with each client library
        return "silent"
    return "there"


def loading_options(name: str, file: str = "config.json") -> dict[str, Any]:
    """What transformers' `from_pretrained` is to be told beside a name: nothing for a folder and for what the hub
    has; where the hub does not answer, to take what was downloaded before.

    Args:
        name: folder or hub name.
        file: what must be among the downloads to try them.

    Raises:
        UserError: no such folder, and nothing of that name on the hub or, offline, among the downloads.
    """
    folder = Path(name)
    if folder.exists():
        return {}
    if folder.is_absolute() or name.startswith(".") or len(folder.parts) > 2:  # hub names have one slash at most
        raise UserError(f"{name} holds no saved model: it does not exist{_neighbour(folder)}")
    answer = ask_hub(name, "model")
    if answer == "silent" and _downloaded(name, file):
        return {"local_files_only": True}
    if answer != "there":
        raise UserError(
            f"no model {name!r}: there is no such folder{_neighbour(folder)}, and {of_the_hub(answer)}; give a "
            "folder, a hub name (owner/name), or package:NAME for the GGUF file of an installed package"
        )
    return {}


def of_the_hub(answer: Answer) -> str:
    """Why a name was not found, in words."""
    if answer == "silent":
        return "the Hugging Face hub cannot be reached, and nothing of that name was downloaded before"
    return "the Hugging Face hub has none of that name that you may see"


def _downloaded(name: str, file: str) -> bool:
    try:
        return isinstance(try_to_load_from_cache(name, file), str)
    except HFValidationError:
        return False


def _neighbour(folder: Path) -> str:
    """A folder with nearly this name, for who mistyped it."""
    beside: Sequence[Path] = []
    if os.access(folder.parent, os.R_OK) and folder.parent.is_dir():
        beside = [path for path in folder.parent.iterdir() if path.is_dir()]
    return nearest(str(folder), [str(path) for path in beside])
