"""The base of everything a recipe may say: typed, closed, documented by attribute docstrings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Frozen; an unknown key is an error (named with the nearest key by the recipe loader)."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
