"""docs/add-a-router.md, followed to the letter: its code blocks become the files they name, and are run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import crossways

ROOT = Path(__file__).parents[2]
DOC = ROOT / "docs" / "add-a-router.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks():
    """File name to content of the Python blocks, and the YAML block."""
    found = BLOCK.findall(DOC.read_text(encoding="utf-8"))
    files = {}
    for language, body in found:
        if language == "python":
            head, rest = body.split("\n", 1)
            files[head.removeprefix("# file: ")] = rest
    recipes = [yaml.safe_load(body) for language, body in found if language == "yaml"]
    return files, recipes


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package with the new files where the page says they belong."""
    package = tmp_path / "src" / "crossways"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(crossways.__file__).parent, package, ignore=ignored)
    files, _ = blocks()
    (package / "rules" / "select" / "floor_k.py").write_text(files["floor_k.py"], encoding="utf-8")
    for name in ("test_floor_k.py", "use_floor_k.py"):
        (tmp_path / name).write_text(files[name], encoding="utf-8")
    return tmp_path


def run(checkout, *arguments):
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=checkout, env=environment, capture_output=True, text=True, check=False
    )


def test_one_file_and_one_test_are_enough(checkout):
    result = run(checkout, "-m", "pytest", "-q", "test_floor_k.py", "-p", "no:cacheprovider")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "3 passed" in result.stdout
    used = run(checkout, "use_floor_k.py")
    assert used.returncode == 0, used.stderr
    assert used.stdout.startswith("experts per token: [")


def test_the_pages_test_fails_for_a_rule_that_declares_too_much(checkout):
    rule = checkout / "src" / "crossways" / "rules" / "select" / "floor_k.py"
    rule.write_text(rule.read_text().replace("exact_budget = False", "exact_budget = True"))
    result = run(checkout, "-m", "pytest", "-q", "test_floor_k.py", "-p", "no:cacheprovider")
    assert result.returncode == 1
    assert "exact_budget is declared True but observed False" in result.stdout


def test_the_page_names_its_files_and_a_recipe():
    files, recipes = blocks()
    assert list(files) == ["floor_k.py", "test_floor_k.py", "use_floor_k.py"]
    assert recipes == [{"model": {"select": {"name": "floor_k", "k": 2, "floor": 0.05}}}]
    text = DOC.read_text(encoding="utf-8")
    for path in re.findall(r"`(src/crossways/[\w/]+/|src/crossways/[\w/.]+\.yaml)`", text):
        assert (ROOT / path).exists(), path
