"""Block shapes: how much of a matrix product one program does.

The number of rows follows from how many pairs an expert gets on average, because the plan of tiles depends on it; the
rest is timed by Triton's autotuner, once for each combination of sizes, among the few candidates that suit the shape
and fit the device's shared memory.

Legend: M rows, N columns, K inner dimension of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

MIN_BLOCK_N = 32
"""Fewest columns that any candidate takes; bounds the number of column tiles before one is chosen."""

# (BLOCK_N, BLOCK_K, warps, stages), the most promising first.
_ROW_PRODUCTS = (
    (128, 64, 8, 4),
    (256, 64, 8, 4),
    (128, 64, 8, 3),
    (256, 64, 8, 3),
    (128, 64, 4, 4),
    (128, 32, 8, 4),
    (64, 64, 8, 4),
    (64, 64, 4, 4),
    (64, 32, 8, 4),
    (32, 16, 8, 4),  # with 32 of K, registers spill in float32 on one architecture or another
    (32, 32, 8, 3),
)
# (BLOCK_I, BLOCK_J, BLOCK_R, warps, stages): rows and columns of the gradient, and pairs summed at a time. The rows'
# addresses are loaded too, so that Triton keeps a buffer for every other stage only.
_WEIGHT_GRADS = (
    (128, 128, 64, 8, 5),
    (128, 256, 64, 8, 5),
    (128, 128, 32, 8, 7),
    (64, 128, 64, 4, 5),
    (64, 64, 32, 4, 5),
    (32, 32, 32, 4, 3),
)
_MOST_CANDIDATES = 4


class Limits(NamedTuple):
    """What one program may use."""

    shared_memory: int
    """Bytes: 227 KB on an H100, 163 KB on an A100, 99 KB on consumer cards."""
    accumulators: int
    """Registers of a thread for sums of 16-bit products; beyond these, compiled kernels were seen to spill. Of
    float32 products half as many."""


def limits_of(device: torch.device) -> Limits:
    """Those of a CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    shared_memory = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Limits(shared_memory, 128 if properties.major >= 9 else 64)


def block_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile: at least half an expert's mean load, 16 to 128, so that little of the last tile is idle."""
    mean_load = num_pairs // max(num_experts, 1)
    return min(max(triton.next_power_of_2(mean_load // 2 + 1), 16), 128)


def load_class(num_pairs: int, num_experts: int) -> int:
    """An expert's mean load rounded up to a power of four, 16 to 4096; block shapes are timed once for each."""
    mean_load = num_pairs // max(num_experts, 1)
    return next((load for load in (16, 64, 256, 1024) if mean_load <= load), 4096)


def row_product_configs() -> list[triton.Config]:
    """All candidates for products that give one row a pair."""
    return [
        triton.Config({"BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8}, num_warps=warps, num_stages=stages)
        for n, k, warps, stages in _ROW_PRODUCTS
    ]


def weight_grad_configs() -> list[triton.Config]:
    """All candidates for products that sum over an expert's pairs."""
    return [
        triton.Config({"BLOCK_I": i, "BLOCK_J": j, "BLOCK_R": r}, num_warps=warps, num_stages=stages)
        for i, j, r, warps, stages in _WEIGHT_GRADS
    ]


def row_product_candidates(
    limits: Limits,
    block_m: int,
    columns: int,
    element_size: int,
    matrices: int = 1,
    held: int = 1,
    in_pieces: bool = False,
) -> list[triton.Config]:
    """Those that suit a product of this shape.

    Args:
        limits: of the device.
        block_m: rows of a tile.
        columns: N.
        element_size: bytes of an input's element.
        matrices: how many matrices the rows are multiplied by at once.
        held: tiles of M x N float32 that one program works on after the product.
        in_pieces: whether of the widest tiles it works on small pieces then, and holds one tile.
    """
    most = limits.accumulators * 2 // element_size
    # Without tensor cores all of BLOCK_K is unrolled, and more than 32 were seen to spill.
    deepest = 32 if element_size == 4 else 64

    def suits(config: triton.Config) -> bool:
        n, k = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
        tiles = max(matrices, 1 if in_pieces and n > 128 else held)
        registers = block_m * n * tiles / (32 * config.num_warps)
        staged = (block_m + n * matrices) * k * config.num_stages * element_size
        return k <= deepest and registers <= most and staged <= limits.shared_memory and not _too_wide(n, columns)

    return [config for config in row_product_configs() if suits(config)][:_MOST_CANDIDATES]


def weight_grad_candidates(limits: Limits, rows: int, columns: int, element_size: int) -> list[triton.Config]:
    """Those that suit a gradient of this shape."""
    most = limits.accumulators * 2 // element_size
    deepest = 32 if element_size == 4 else 64  # as above

    def suits(config: triton.Config) -> bool:
        i, j, r = (config.kwargs[name] for name in ("BLOCK_I", "BLOCK_J", "BLOCK_R"))
        registers = i * j / (32 * config.num_warps)
        staged = (i + j) * r * (config.num_stages // 2 + 1) * element_size
        narrow = not _too_wide(i, rows) and not _too_wide(j, columns)
        return r <= deepest and registers <= most and staged <= limits.shared_memory and narrow

    return [config for config in weight_grad_configs() if suits(config)][:_MOST_CANDIDATES]


def prune_row_products(
    columns: str, held: int = 1, twice_if_gated: bool = False, in_pieces: bool = False
) -> Callable[..., list[triton.Config]]:
    """A pruning function for a kernel.

    Args:
        columns: its argument that holds N.
        held: see `row_product_candidates`.
        twice_if_gated: whether it multiplies by two matrices where its activation is gated.
        in_pieces: see `row_product_candidates`.
    """

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **meta: Any) -> list[triton.Config]:
        known = {**arguments, **meta}
        tensor = _first_tensor(known)
        if not tensor.is_cuda:
            return configs[-1:]
        matrices = 2 if twice_if_gated and known["GATED"] else 1
        shape = known["BLOCK_M"], known[columns], tensor.element_size()
        found = row_product_candidates(limits_of(tensor.device), *shape, matrices, held, in_pieces)
        return found or configs[-1:]

    return prune


def prune_weight_grads(configs: list[triton.Config], arguments: dict[str, Any], **meta: Any) -> list[triton.Config]:
    """The pruning function of the kernel of weight gradients."""
    tensor = _first_tensor(arguments)
    if not tensor.is_cuda:
        return configs[-1:]
    shape = arguments["ROWS"], arguments["COLUMNS"], tensor.element_size()
    return weight_grad_candidates(limits_of(tensor.device), *shape) or configs[-1:]


def _too_wide(block: int, size: int) -> bool:
    return block > max(triton.next_power_of_2(size), MIN_BLOCK_N)


def _first_tensor(arguments: dict[str, Any]) -> Tensor:
    """The tensor whose dtype and device decide: the first factor of the product."""
    return next(value for value in arguments.values() if isinstance(value, Tensor))
