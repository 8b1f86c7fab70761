"""Checkpoints that a kill cut short."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def remove_torn_checkpoints(folder: Path) -> list[Path]:
    """Delete the `checkpoint-*` folders that were not written to their end, and return them.

    The trainer writes its state last, so a checkpoint is whole when that file is.
    """
    torn = [path for path in folder.glob("checkpoint-*") if not _whole(path / "trainer_state.json")]
    for path in torn:
        shutil.rmtree(path)
    return torn


def _whole(state: Path) -> bool:
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
