"""What scores and selections have in common: they are values."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


class Value:
    """A frozen dataclass that can be made inside a compiled function.

    `torch.compile` of torch 2.11 hashes an object that was made there when it is called, and looks at a stand-in
    without fields; the hash that dataclasses write for themselves fails on that.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__hash__ = _hash  # type: ignore[method-assign, assignment]  # which `dataclass` leaves alone


def _hash(self: Any) -> int:
    return hash((type(self), *(getattr(self, field.name, None) for field in fields(self))))
