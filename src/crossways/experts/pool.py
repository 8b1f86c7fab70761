"""Memory that is used again, without a compiler: what `native/pool.cpp` is to `fused`, this is to `loop`.

The C library takes large tensors from the system one by one and gives them back at once, and the system clears each
page when it is first touched: that can take longer than what is computed into it. Blocks from here return to a pool
when the last tensor that uses them is gone. No more of them wait than were in use at once.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_SMALL = 2**20
"""Bytes below which the C library recycles well enough."""
_PAGE = 2**21
"""Bytes of a large page, which the system is asked for where it has them."""
_PLACES, _STEP = 16, 4096 + 256
"""Tensors begin in one of so many places, so many bytes apart. If all began where a large page does, operations on
several of them would be slower: presumably their rows fall into the same sets of the caches."""
_PATIENCE = 64
"""How many blocks are taken until one that waits counts as waiting long: then the system may have its pages."""


def empty(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised CPU tensor, like `torch.empty`; from the pool if it is large.

    Args:
        shape: its shape.
        like: whose dtype and device it has.
        dtype: another dtype.

    Raises:
        OSError: when the system has no memory left.
    """
    dtype = dtype or like.dtype
    count = math.prod(shape)
    if count * dtype.itemsize < _SMALL or not like.is_cpu:
        return torch.empty(shape, dtype=dtype, device=like.device)
    return _pool().take(count * dtype.itemsize).view(dtype).view(tuple(shape))


@cache
def _pool() -> Pool:
    return Pool()


@dataclass
class _Block:
    memory: mmap.mmap
    address: int
    size: int
    since: int = 0
    """How many blocks had been taken when it came back."""
    marked: bool = False


class Pool:
    """Blocks of whole large pages."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._returned: deque[_Block] = deque()
        """Appended to by finalizers, which may run at any moment, in the middle of `take` as well."""
        self._waiting: list[_Block] = []
        self._in_use = self._most = self._taken = 0

    @torch.compiler.disable  # what it does is no operator
    def take(self, size: int) -> Tensor:
        """`size` bytes of any content (uint8); the block comes back when the last view of them is gone."""
        block_size = -(-(size + _PLACES * _STEP) // _PAGE) * _PAGE
        with self._lock:
            self._collect()
            block = self._best(block_size) or _map(block_size)
            self._taken += 1
            place = self._taken % _PLACES * _STEP
            self._in_use += block.size
            self._most = max(self._most, self._in_use)
        held = (ctypes.c_char * block.size).from_address(block.address)
        weakref.finalize(held, self._returned.append, block).atexit = False
        return torch.frombuffer(held, dtype=torch.uint8, count=size, offset=place)

    def _best(self, size: int) -> _Block | None:
        """The smallest that waits and is at most a quarter too large; of those, what the caches saw last."""
        fitting = [block for block in self._waiting if size <= block.size <= size + size // 4]
        if not fitting:
            return None
        block = min(reversed(fitting), key=lambda one: one.size)
        self._waiting.remove(block)
        block.marked = False
        return block

    def _collect(self) -> None:
        """Let what came back wait, oldest first; drop what is too much, and mark what waits long."""
        while self._returned:
            block = self._returned.popleft()
            block.since = self._taken
            self._in_use -= block.size
            self._waiting.append(block)
        waits = sum(block.size for block in self._waiting)
        while waits + self._in_use > self._most:
            waits -= self._waiting.pop(0).size
        for block in self._waiting:
            if not block.marked and self._taken - block.since > _PATIENCE:
                block.marked = True
                if hasattr(mmap, "MADV_FREE"):
                    block.memory.madvise(mmap.MADV_FREE)


def _map(size: int) -> _Block:
    """Fresh memory from the system, aligned to large pages."""
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size + _PAGE, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    first = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(first)
    return _Block(memory, address + -address % _PAGE, size)
