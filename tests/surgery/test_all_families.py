"""Transformers' own source, searched for routed families that the catalogue does not name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import transformers

MODELS = Path(transformers.__file__).parent / "models"

NOT_ROUTED = {
    "granite_docling": "its router picks between two connectors for a whole picture",
}
"""Families with a class called like a router or like experts that are something else."""


def routed_classes(path: Path) -> set[str]:
    """Classes of a modeling file that hold several experts, or are called like routers or experts."""
    found: set[str] = set()
    text = path.read_text(encoding="utf-8")
    if not re.search(r"[Ee]xpert|Router|Gating|MoE|Moe", text):  # parsing takes long
        return found
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and (_is_called_routed(node.name) or _holds_experts(node)):
            found.add(node.name)
    return found


def _is_called_routed(name: str) -> bool:
    return bool(re.search(r"(Router|Gating|Experts|MoE|Moe|MoeBlock|MoeMLP|NaiveMoe)$", name))


def _holds_experts(node: ast.ClassDef) -> bool:
    """A parameter of three dimensions with a projection's name, or a list of modules with experts in its name."""
    for statement in ast.walk(node):
        if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Attribute):
            continue
        name = statement.targets[0].attr
        if not ("expert" in name or name.endswith(("down_proj", "up_proj"))):
            continue
        value = ast.unparse(statement.value)
        if re.search(r"Module(List|Dict)\(", value) and "expert" in name:
            return True
        if re.match(r"(torch\.)?nn\.Parameter\(", value):
            shapes = [call.args for call in ast.walk(statement.value) if isinstance(call, ast.Call)]
            flat = [args[0].elts if len(args) == 1 and isinstance(args[0], ast.Tuple) else args for args in shapes]
            if any(len(args) == 3 for args in flat):
                return True
    return False


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the catalogue is of transformers 5.23")
def test_every_routed_family_of_transformers_is_in_the_catalogue(catalogue):
    known = {entry.get("module", name) for name, entry in catalogue.items()} | set(NOT_ROUTED)
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        if classes := routed_classes(path):
            found.setdefault(path.parent.name, set()).update(classes)
    assert len(found) > 60, "the search finds less than there is"
    assert {name: classes for name, classes in found.items() if name not in known} == {}


def test_the_search_finds_each_kind(tmp_path):
    file = tmp_path / "modeling_some.py"
    made = {"A": "self.down_proj = nn.Parameter(torch.empty(8, 4, 2))", "B": "self.experts = nn.ModuleList(many)"}
    made |= {"D": "self.down_proj = nn.Parameter(torch.empty(4, 2))", "CTopKRouter": "pass", "SomeMoeModel": "pass"}
    lines = (f"class {name}(nn.Module):\n    def __init__(self):\n        {line}\n" for name, line in made.items())
    file.write_text("".join(lines))
    assert routed_classes(file) == {"A", "B", "CTopKRouter"}
