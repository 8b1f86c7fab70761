"""Block shapes: how much of a matrix product one program does.

The number of rows follows from how many pairs an expert gets on average, because the plan of tiles depends on it; the
rest is timed by Triton's autotuner, once for each combination of sizes, among the few candidates that suit the shape
and fit the device's shared memory.

Legend: M rows, N columns, K inner dimension of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

MIN_BLOCK_N = 32
"""Fewest columns that any candidate takes; bounds the number of column tiles before one is chosen."""

# (BLOCK_N, BLOCK_K, warps, stages), the most promising first.
_ROW_PRODUCTS = (
    (128, 64, 8, 3),
    (256, 64, 8, 3),
    (128, 64, 4, 4),
    (128, 32, 8, 4),
    (64, 64, 4, 4),
    (64, 32, 4, 4),
    (32, 32, 4, 3),
)
# (BLOCK_I, BLOCK_J, BLOCK_R, warps, stages): rows and columns of the gradient, and pairs summed at a time.
_WEIGHT_GRADS = (
    (128, 128, 64, 8, 3),
    (128, 256, 32, 8, 3),
    (128, 128, 32, 8, 4),
    (64, 128, 32, 4, 4),
    (64, 64, 32, 4, 4),
    (32, 32, 32, 4, 3),
)
_MOST_CANDIDATES = 4


def block_rows(num_pairs: int, num_experts: int) -> int:
    """Rows of a tile: half an expert's mean load or more, 16 to 128, so that little of the last tile is idle."""
    mean_load = num_pairs // max(num_experts, 1)
    return min(max(triton.next_power_of_2(mean_load // 2 + 1), 16), 128)


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


def prune_row_products(columns: str, gated_matrices: bool) -> Callable[..., list[triton.Config]]:
    """A pruning function for a kernel whose argument `columns` holds N.

    Args:
        columns: the argument's name.
        gated_matrices: whether the kernel, where its activation is gated, multiplies by two matrices at once.
    """

    def prune(configs: list[triton.Config], arguments: dict[str, Any], **meta: Any) -> list[triton.Config]:
        known = {**arguments, **meta}
        matrices = 2 if gated_matrices and known["GATED"] else 1
        fits = []
        for config in configs:
            n, k = config.kwargs["BLOCK_N"], config.kwargs["BLOCK_K"]
            # Accumulators: at most 128 float32 registers a thread.
            enough_registers = known["BLOCK_M"] * n * matrices <= 128 * 32 * config.num_warps
            staged = (known["BLOCK_M"] + n * matrices) * k * config.num_stages
            if enough_registers and _fits(staged, known) and not _too_wide(n, known[columns]):
                fits.append(config)
        return _few(fits, configs, known)

    return prune


def prune_weight_grads(
    configs: list[triton.Config], arguments: dict[str, Any], **meta: Any
) -> list[triton.Config]:
    """The candidates for a gradient of I rows and J columns."""
    known = {**arguments, **meta}
    fits = []
    for config in configs:
        i, j, r = (config.kwargs[name] for name in ("BLOCK_I", "BLOCK_J", "BLOCK_R"))
        narrow = not _too_wide(i, known["ROWS"]) and not _too_wide(j, known["COLUMNS"])
        enough_registers = i * j <= 128 * 32 * config.num_warps
        if narrow and enough_registers and _fits((i + j) * r * config.num_stages, known):
            fits.append(config)
    return _few(fits, configs, known)


def _few(fits: list[triton.Config], configs: list[triton.Config], known: dict[str, Any]) -> list[triton.Config]:
    """The first few; one, the smallest, where nothing can be timed or nothing fits."""
    return fits[:_MOST_CANDIDATES] if fits and _tensor(known).is_cuda else configs[-1:]


def _too_wide(block: int, size: int) -> bool:
    return block > max(triton.next_power_of_2(size), MIN_BLOCK_N)


def _fits(elements: int, known: dict[str, Any]) -> bool:
    tensor = _tensor(known)
    if not tensor.is_cuda:
        return True
    # 227 KB on an H100, 163 KB on an A100, 99 KB on consumer cards.
    limit = torch.cuda.get_device_properties(tensor.device).shared_memory_per_block_optin
    return elements * tensor.element_size() <= limit


def _tensor(known: dict[str, Any]) -> Tensor:
    """The tensor whose dtype and device decide: the first factor of the product."""
    return next(value for value in known.values() if isinstance(value, Tensor))
