"""What the routers of somebody else's model must know of a forward pass, and are not told: rows, padding, decoding.

Legend: B batch, S sequence, E experts, C cutoffs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
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
    """Boolean (B, S), false for padding; None when there is none, or the mask does not say."""
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
        parts = ", ".join(dict.fromkeys(block.name.partition(".")[0] for block in blocks))
        raise UnknownRoutingError(
            f"{type(model).__name__}: no module over all routed blocks takes inputs_embeds and attention_mask, so "
            f"rows and padding cannot be told apart; reroute the part of it that reads text (blocks lie in: {parts})"
        )
    return inner


def read_pass(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> PassState | None:
    """What the arguments of a decoder's `forward` say; None if they hold neither ids nor embeddings."""
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    ids_BS, embeds_BSD = given.get("input_ids"), given.get("inputs_embeds")
    tokens = ids_BS if ids_BS is not None else embeds_BSD
    if tokens is None:
        return None
    rows, length = tokens.shape[:2]
    cached = _cached(given.get("past_key_values"))
    return PassState(
        rows=rows,
        length=length,
        valid_BS=_valid(given.get("attention_mask"), rows, length, cached),
        token_ids_BS=ids_BS,
        decoding=cached > 0,
    )


def _valid(mask: Any, rows: int, length: int, cached: int) -> Tensor | None:
    """Which of this pass' tokens are no padding; None where all are, or the mask is of a form that does not say."""
    if isinstance(mask, Mapping):  # a mask for each kind of attention; padding is the same in all
        mask = next((each for each in mask.values() if isinstance(each, Tensor)), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        valid_BS = mask[:, -length:].bool()
    else:  # (B, 1, S, keys): padding alone does not attend to itself
        own_BS = mask[:, 0].diagonal(cached, -2, -1)
        valid_BS = own_BS if own_BS.dtype == torch.bool else own_BS >= 0
    if valid_BS.shape[1] != length or bool(valid_BS.all()):
        return None
    return valid_BS.expand(rows, length)


def _cached(cache: Any) -> int:
    """Tokens that a cache holds; 1 for one of recurrent layers alone that holds some, since it does not count."""
    if not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:
        return int(bool(cache.has_previous_state()))
