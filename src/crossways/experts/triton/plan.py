"""Who does what, decided on the device: tiles of rows for the matrix products, and every token's pairs.

How many tiles there are follows from the loads, which the host does not know; it launches as many programs as there
could be, and those without rows return at once.

Legend: T tokens, P pairs, E experts, G tiles, M rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Tiles(NamedTuple):
    """The row tiles of the grouped products: no tile has rows of two experts."""

    expert_G: Tensor
    """Expert of each tile, int32; -1 for those that are not needed."""
    row_G: Tensor
    """First pair of each tile, int32."""


class TokenPairs(NamedTuple):
    """Each token's pairs, in the order of their experts."""

    pair_P: Tensor
    """Pairs token by token, int64."""
    start_T1: Tensor
    """Where each token's begin, and the end of the last, int64 (T + 1,)."""


def num_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """The most tiles that any loads can need."""
    return triton.cdiv(num_pairs, block_rows) + min(num_experts, num_pairs)


def plan_tiles(offsets_E1: Tensor, num_pairs: int, block_rows: int) -> Tiles:
    """Cut every expert's pairs into tiles.

    Args:
        offsets_E1: first pair of each expert, and the end of the last, int64.
        num_pairs: length of the pair tensors.
        block_rows: most pairs of a tile.
    """
    num_experts = offsets_E1.numel() - 1
    tiles = num_tiles(num_pairs, num_experts, block_rows)
    expert_G, row_G = (torch.empty(tiles, dtype=torch.int32, device=offsets_E1.device) for _ in range(2))
    block_e = triton.next_power_of_2(num_experts)
    block_g = max(4096 // block_e, 1)
    tile_kernel[(triton.cdiv(tiles, block_g),)](
        offsets_E1, expert_G, row_G, tiles, num_experts, BLOCK_M=block_rows, BLOCK_E=block_e, BLOCK_G=block_g
    )
    return Tiles(expert_G, row_G)


@triton.jit
def tile_kernel(
    offsets_ptr,
    expert_ptr,
    row_ptr,
    tiles,
    experts,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """A tile's expert is the number of experts whose tiles all come before it."""
    e = tl.arange(0, BLOCK_E)
    begin = tl.load(offsets_ptr + e, mask=e < experts, other=0)
    end = tl.load(offsets_ptr + e + 1, mask=e < experts, other=0)
    last_E = tl.cumsum((end - begin + BLOCK_M - 1) // BLOCK_M, 0)
    tile = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)
    done = (last_E[None, :] <= tile[:, None]) & (e < experts)[None, :]
    expert = tl.sum(done.to(tl.int32), 1)
    before = tl.max(tl.where(done, last_E[None, :], 0), 1)
    used = (tile < tiles) & (expert < experts)
    first = tl.load(offsets_ptr + expert, mask=used, other=0)
    tl.store(expert_ptr + tile, tl.where(used, expert, -1), mask=tile < tiles)
    row = tl.where(used, first + (tile - before) * BLOCK_M, 0)
    tl.store(row_ptr + tile, row.to(tl.int32), mask=tile < tiles)


def pairs_of_tokens(token_P: Tensor, offsets_E1: Tensor, num_tokens: int) -> TokenPairs:
    """Sort the pairs by token, stably.

    Args:
        token_P: token of each pair, int64.
        offsets_E1: as above; pairs from its last entry on are slack and belong to nobody.
        num_tokens: T.
    """
    device = token_P.device
    slack_P = torch.arange(token_P.numel(), device=device) >= offsets_E1[-1]
    # A GPU sorts by a few bits at a time, so narrow keys take fewer passes.
    key = torch.int16 if num_tokens < 2**15 else torch.int32
    sorted_P, pair_P = torch.sort(token_P.masked_fill(slack_P, num_tokens).to(key), stable=True)
    bounds_T1 = torch.arange(num_tokens + 1, device=device, dtype=key)
    return TokenPairs(pair_P, torch.searchsorted(sorted_P, bounds_T1))
