"""How many of a stream of numbers reach a cutoff: bounded memory, exact when few, and always exact about its own
cutoff.

Legend: N numbers, K buckets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from crossways.errors import UserError


@dataclass(frozen=True)
class Cutoff:
    """A cutoff that about the wanted number of values reach."""

    value: float
    """The cutoff."""
    reached: int
    """How many of the stream's values are at least as great; exact."""


class RankSketch:
    """A histogram of float32 values over their bit patterns.

    It starts with one bucket per distinct value. When there are more than `limit`, neighbouring buckets are joined
    in pairs along the bits of the mantissa, so that a bucket's width is at most 2^(shift - 23) of its values. Cutoffs
    are always edges of buckets, whose counts are exact; what is lost is only the choice of cutoffs between them. So
    the number that reaches the cutoff misses the wanted one by at most half of one bucket's count.
    """

    def __init__(self, limit: int = 2**16) -> None:
        """
        Args:
            limit: buckets to keep, at least 2; 16 bytes each. 4,096 to 1,000,000.
        """
        if limit < 2:
            raise UserError(f"a rank sketch needs at least 2 buckets, got {limit}")
        self.limit, self.shift, self.total = limit, 0, 0
        self._key_K = torch.zeros(0, dtype=torch.int64)
        self._count_K = torch.zeros(0, dtype=torch.int64)

    def add(self, value_N: Tensor) -> None:
        """Count values, any shape; raises `ValueError` for one that is not a number."""
        value_N = value_N.detach().flatten().float()
        if value_N.isnan().any():
            raise ValueError("a score is not a number: the model is broken, and no cutoff would mean anything")
        key_N = _ordered(value_N) >> self.shift
        key_K, count_K = key_N.unique(return_counts=True)
        self._join(torch.cat([self._key_K, key_K.cpu()]), torch.cat([self._count_K, count_K.cpu()]))
        self.total += value_N.numel()

    def cutoff(self, wanted: int) -> Cutoff:
        """The cutoff that as nearly as possible `wanted` values reach, 0 to the number added; of two equally near
        ones the lower."""
        if not self.total or not 0 <= wanted <= self.total:
            raise ValueError(f"cannot let {wanted} of {self.total} values pass")
        reached_K = self._count_K.flip(0).cumsum(0).flip(0)
        bucket = max(int((reached_K >= wanted).sum()) - 1, 0)
        below, above = int(reached_K[bucket]), int(reached_K[bucket] - self._count_K[bucket])
        if below - wanted <= wanted - above:
            return Cutoff(_value(int(self._key_K[bucket]) << self.shift), below)
        return Cutoff(_value(int(self._key_K[bucket] + 1) << self.shift), above)

    def _join(self, key_K: Tensor, count_K: Tensor) -> None:
        while True:
            unique_K, index_K = key_K.unique(return_inverse=True)
            count_K = torch.zeros_like(unique_K).index_add_(0, index_K, count_K)
            key_K = unique_K
            if len(key_K) <= self.limit:
                break
            key_K, self.shift = key_K >> 1, self.shift + 1
        self._key_K, self._count_K = key_K, count_K


def _ordered(value_N: Tensor) -> Tensor:
    """Whole numbers, int64 (N,), in the order of the float32 values; both zeros are one."""
    bits_N = (value_N + 0.0).view(torch.int32)
    return (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).long()


def _value(key: int) -> float:
    """The value of an ordered number; of one beyond either infinity, that infinity."""
    key = max(min(key, 0x7F800000), -0x7F800001)
    bits = torch.tensor(key if key >= 0 else key ^ 0x7FFFFFFF, dtype=torch.int32)
    return float(bits.view(torch.float32))
