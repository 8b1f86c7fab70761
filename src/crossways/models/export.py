"""From a saved model to a folder that plain transformers loads."""

from __future__ import annotations

from pathlib import Path

from crossways.errors import UserError
from crossways.models.checkpoint import load_checkpoint
from crossways.models.convert import to_mixtral, to_qwen2_moe

FAMILIES = {"qwen2-moe": to_qwen2_moe, "mixtral": to_mixtral}


def export_checkpoint(checkpoint: Path, family: str, out: Path) -> None:
    """Convert the model in `checkpoint` and write it, with its tokenizer, to `out`.

    Raises:
        UserError: an unknown family, no model in `checkpoint`, something in `out` already, or routing that the family
            cannot express.
    """
    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}; choose one of {', '.join(FAMILIES)}")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; choose another --out")
    model, tokenizer = load_checkpoint(checkpoint)
    FAMILIES[family](model).save_pretrained(out)
    tokenizer.save_pretrained(out)
