"""One process at a time in a folder of results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from crossways.errors import UserError


@contextmanager
def locked(out: Path, what: str = "study") -> Iterator[None]:
    """Keep a second one out of the folder, which is made; the system frees the lock of a process that died.

    Raises:
        UserError: if there is one, or the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {out}: {error.strerror}") from error
    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise UserError(f"another {what} is at work in {out}; wait for it or use another --out") from error
