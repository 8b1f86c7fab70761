"""docs/rerouting.md and the README: their Python is run, and what is said of families and presets is so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from crossways.surgery.rule import presets

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "rerouting.md"
FAMILIES = ROOT / "tests" / "surgery" / "families.yaml"


@pytest.mark.parametrize("page", [PAGE, ROOT / "README.md"], ids=lambda page: page.name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    assert "tensor(" in capsys.readouterr().out


def test_the_page_lists_the_presets_and_the_families_that_are_tested():
    text = PAGE.read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE) == list(presets())
    entries = yaml.safe_load(FAMILIES.read_text(encoding="utf-8"))
    expected = {entry.get("module", name) for name, entry in entries.items() if "refused" not in entry}
    listed = text.split("<!-- families -->")[1].split("\n\n")[1]
    assert set(re.findall(r"\w+", listed)) == expected
