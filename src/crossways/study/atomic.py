"""Write a file whole or not at all, so that a run killed at any point leaves nothing half-written."""

from __future__ import annotations

import os
from pathlib import Path


def write_text_atomic(path: Path, text: str) -> Path:
    """Write `text` as UTF-8 to a temporary file beside `path`, then rename it over `path`.

    Missing parent folders are made. Returns `path`. Raises `OSError` when the folder cannot be written; then
    no temporary file is left and an older `path` is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Opened by name and not through `tempfile`, whose files nobody but the owner could read after the rename.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
