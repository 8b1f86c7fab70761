"""docs/map.md names every source file, alone or by its folder, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "crossways"


def named() -> set[str]:
    """Paths in its tables; a bare name after a path lies in the same folder."""
    found: set[str] = set()
    for row in (ROOT / "docs" / "map.md").read_text(encoding="utf-8").splitlines():
        folder = ""
        for path in re.findall(r"`([^`]+)`", row) if row.startswith("|") else ():
            beside = f"{folder}{path}"
            path = beside if "/" not in path and (SOURCE / beside).is_file() else path
            folder = path[: path.rfind("/") + 1]
            found.add(path)
    return {path for path in found if path.endswith((".py", "/"))}


def test_every_source_file_is_on_the_map():
    files = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.name != "__init__.py"}
    folders = tuple(path for path in named() if path.endswith("/"))
    assert sorted(file for file in files - named() if not file.startswith(folders)) == []


def test_everything_on_the_map_exists():
    assert sorted(path for path in named() if not (SOURCE / path).exists()) == []
