"""What the routers of somebody else's model must know of a forward pass, and are not told: rows, padding, decoding.

Legend: B batch, S sequence, E experts, C cutoffs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from crossways.surgery.find import Block, UnknownRoutingError


@dataclass(frozen=True)
class PassState:
    """One forward pass of the decoder."""

    rows: int
    """B."""
    length: int
    """S."""
    valid_BS: Tensor | None
    """Boolean (B, S), false for padding; None when there is none, or the mask is of another form."""
    token_ids_BS: Tensor | None
    decoding: bool
    """Whether a cache already holds earlier tokens."""


def find_decoder(model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """The innermost module that holds all blocks and is called with embeddings or ids and an attention mask."""
    inner: nn.Module | None = None
    depth = -1
    for name, module in model.named_modules():
        holds_all = not name or all(block.name == name or block.name.startswith(f"{name}.") for block in blocks)
        names = inspect.signature(module.forward).parameters if holds_all else ()
        if {"inputs_embeds", "attention_mask"} <= set(names) and name.count(".") + bool(name) > depth:
            inner, depth = module, name.count(".") + bool(name)
    if inner is None:
        raise UnknownRoutingError(
            f"{type(model).__name__}: no module over all routed blocks takes inputs_embeds and attention_mask, so "
            "rows and padding cannot be told apart"
        )
    return inner


def read_pass(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> PassState | None:
    """What the arguments of a decoder's `forward` say; None if they hold neither ids nor embeddings."""
    given = inspect.signature(forward).bind_partial(*args, **kwargs).arguments
    given |= given.pop("kwargs", {})
    ids_BS, embeds_BSD = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids_BS if ids_BS is not None else embeds_BSD
    if tokens is None:
        return None
    rows, length = tokens.shape[:2]
    return PassState(
        rows=rows,
        length=length,
        valid_BS=_valid(given.get("attention_mask"), length),
        token_ids_BS=ids_BS,
        decoding=_cached(given.get("past_key_values")) > 0,
    )


def _valid(mask: Any, length: int) -> Tensor | None:
    """The part of a two-dimensional mask that belongs to this pass' tokens; None where nothing is masked."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    valid_BS = mask[:, -length:].bool()
    return None if bool(valid_BS.all()) else valid_BS


def _cached(cache: Any) -> int:
    return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
