"""What the routers of somebody else's model must know of a forward pass, and are not told: rows, padding, decoding.

Legend: B batch, S sequence, N packed sequences, L longest of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from crossways.routing import Decided
from crossways.surgery.find import Block, UnknownRoutingError
from crossways.surgery.packing import Packing, find_packing


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
    packing: Packing | None = None
    """How these rows came of those that the pass has, where sequences were packed; None where they are the same."""

    @property
    def tokens(self) -> int:
        """What a router is called with in this pass."""
        return self.rows * self.length if self.packing is None else len(self.packing.place_T)


@dataclass(frozen=True)
class BlockPass:
    """What a block must know of a pass of the decoder. Estimates are copies, so that recomputation under gradient
    checkpointing decides alike after they have been updated."""

    state: PassState | None = None
    causal: bool = False
    cutoff_C: Tensor | None = None
    normaliser_E: Tensor | None = None
    decided: Decided | None = None
    """What to execute instead of deciding."""


SIGNATURES = (("inputs_embeds", "attention_mask"), ("decoder_input_ids", "decoder_attention_mask"))
"""Arguments by which to tell a stack of layers that is called with tokens and their padding."""


def find_stacks(model: nn.Module, blocks: Sequence[Block]) -> list[tuple[nn.Module, list[Block]]]:
    """The innermost modules around the blocks that are called with embeddings or ids and an attention mask, in the
    order of their blocks, each with its own. A model that encodes and decodes has two; most have one.

    Raises:
        UnknownRoutingError: if there is none around a block.
    """
    modules = dict(model.named_modules())
    stacks: dict[str, list[Block]] = {}
    for block in blocks:
        path = _stack_around(modules, block.name)
        if path is None:
            raise UnknownRoutingError(
                f"{type(model).__name__}: no module around {block.name or 'the routed block'} takes inputs_embeds "
                "and attention_mask, so rows and padding cannot be told apart"
            )
        stacks.setdefault(path, []).append(block)
    return [(modules[path], inside) for path, inside in stacks.items()]


def _stack_around(modules: Mapping[str, nn.Module], name: str) -> str | None:
    path = name
    while True:
        names = set(inspect.signature(modules[path].forward).parameters)
        if any(names.issuperset(signature) for signature in SIGNATURES):
            return path
        if not path:
            return None
        path = path.rpartition(".")[0]


def read_pass(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> PassState | None:
    """What the arguments of a decoder's `forward` say; None if they hold neither ids nor embeddings."""
    signature = inspect.signature(forward)
    given = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    prefix = "decoder_" if "decoder_input_ids" in signature.parameters else ""
    ids_BS, embeds_BSD = given.get(f"{prefix}input_ids"), given.get(f"{prefix}inputs_embeds")
    tokens = ids_BS if ids_BS is not None else embeds_BSD
    if tokens is None:
        return None
    rows, length = tokens.shape[:2]
    cached = _cached(given.get("past_key_values"))
    mask = given.get(f"{prefix}attention_mask")
    if mask is None and not cached:
        packing = find_packing(given.get(f"{prefix}position_ids"), rows, length)
        if packing is not None:
            return _packed(packing, ids_BS)
    return PassState(
        rows=rows,
        length=length,
        valid_BS=_valid(mask, rows, length, cached),
        token_ids_BS=ids_BS,
        decoding=cached > 0,
    )


def _packed(packing: Packing, ids_BS: Tensor | None) -> PassState:
    """A pass whose rows are the packed sequences."""
    shape = (packing.rows, packing.length)
    ids_NL = None if ids_BS is None else packing.spread(ids_BS.flatten()).view(shape)
    return PassState(*shape, packing.valid_NL(), ids_NL, decoding=False, packing=packing)


def _valid(mask: Any, rows: int, length: int, cached: int) -> Tensor | None:
    """Which of this pass' tokens are no padding; None where all are, or the mask is of a form that does not say."""
    if isinstance(mask, Mapping):  # a mask for each kind of attention; padding is the same in all
        masks = [each for each in mask.values() if isinstance(each, Tensor)]
        mask = max(masks, key=lambda each: each.shape[-1], default=None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        valid_BS = mask[:, -length:].bool()
    else:  # (B, 1, S, keys): padding alone does not attend to itself
        own_BS = mask[:, 0].diagonal(min(cached, mask.shape[-1] - length), -2, -1)
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
