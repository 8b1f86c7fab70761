"""Copies of what hangs on a model's hooks."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

Hooked = TypeVar("Hooked")


def copy_with(original: Hooked, model: nn.Module | None, memo: dict[int, Any]) -> Hooked:
    """For `__deepcopy__`: a copy if the whole model is being copied, else the original itself.

    Adapters and exponential averages copy single modules, hooks included. Through its hooks such a copy would drag
    along a copy of the whole model, which nobody would ever run.
    """
    if id(model) not in memo:
        return original
    duplicate = object.__new__(type(original))
    memo[id(original)] = duplicate
    state: Any = original.__getstate__()  # type: ignore[attr-defined]
    vars(duplicate).update(copy.deepcopy(state, memo))
    return duplicate
