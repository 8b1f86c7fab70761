"""Read a fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from crossways.errors import UserError
from crossways.finetune.settings import FinetuneRecipe
from crossways.rules.registry import nearest
from crossways.study.load import apply_overrides, parse_yaml, validated


def shipped_finetune_recipes() -> dict[str, str]:
    """The texts of the recipes inside the package, by name."""
    folder = files("crossways") / "recipes" / "finetune"
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in found}


def load_finetune_recipe(name: str, overrides: Sequence[str] = ()) -> FinetuneRecipe:
    """A validated recipe, by the name of a shipped one or by path.

    Raises:
        UserError: one line, for anything wrong in the name, the recipe or an override.
    """
    shipped = shipped_finetune_recipes()
    if name in shipped and not Path(name).is_file():
        text = shipped[name]
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise UserError(
            f"no fine-tuning recipe {name!r}{nearest(name, list(shipped))}; shipped: {', '.join(shipped)}; "
            "or give a YAML file"
        )
    raw = apply_overrides(parse_yaml(text, f"recipe {name}"), overrides)
    return validated(FinetuneRecipe, raw, f"recipe {name}")
