"""Tensors in memory that is used again.

PyTorch asks the system for every large CPU tensor anew, and the kernel clears each page when it is first touched: for
gradients of hundreds of megabytes that takes longer than computing them. Blocks from here go back to a pool when the
last tensor that uses them is gone, as on a GPU. Of those that wait long the kernel may take pages when it needs some.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from crossways.native.loading import library

_SMALL = 4 * 2**20
"""Bytes below which PyTorch's own allocator recycles well enough."""


def reused(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor, like `torch.empty`; from the pool if it is large.

    Raises:
        MemoryError: when the system has no memory left.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _SMALL:
        return torch.empty(shape, dtype=dtype)
    take, give = library().crossways_take_block, library().crossways_give_block
    take.restype, take.argtypes, give.argtypes = ctypes.c_void_p, (ctypes.c_int64,), (ctypes.c_void_p,)
    address = take(size)
    if not address:
        raise MemoryError(f"no memory for a tensor of {size} bytes")
    block = (ctypes.c_char * size).from_address(address)
    weakref.finalize(block, give, address).atexit = False  # the tensor keeps the block, the block gives back
    return torch.frombuffer(block, dtype=dtype, count=count).view(tuple(shape))


def settle(tensor: Tensor) -> None:
    """Move a contiguous CPU tensor to large pages now, at the address that it has.

    `fused` does so by itself with matrices that it computes with, in the first second of such work all of them, of
    larger models a little with every pass. Where the system cannot, or forbids it, nothing happens.
    """
    library().crossways_settle(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes))
