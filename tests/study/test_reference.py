"""The reference of recipe keys is complete, and the page in docs is what the command prints."""

from pathlib import Path

from crossways.models import CrosswaysConfig
from crossways.study.reference import recipe_reference

MARK = "<!-- printed by `crossways recipes --reference` -->"


def test_every_key_has_its_line():
    text = recipe_reference()
    assert "| `max_steps` | `1000` | Optimizer steps;" in text
    assert "| `title` | required | Heading of the report. |" in text
    own = [name for name in CrosswaysConfig.__annotations__ if not name.startswith("_")]
    assert [name for name in own if f"| `{name}` |" not in text] == []
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert all(not row.endswith("|  |") for row in rows), "a key without a docstring"


def test_the_page_in_docs_is_up_to_date():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert page.split(MARK)[1].strip() == recipe_reference().strip(), "run: make docs"
