"""How what the kernels read must lie in memory: rows and columns without gaps, offsets within a matrix of 32 bits.

Whatever lies otherwise is copied once, which costs less than reading it element by element.

Legend: E experts, K inner dimension and N columns of a product.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

from torch import Tensor

_MOST_ELEMENTS = 2**31


class Matrices(NamedTuple):
    """Experts' matrices (K, N) of one product, as the kernels take them."""

    tensor: Tensor
    """Holds the first element."""
    stride_e: int
    """From one expert's matrix to the next."""
    stride: int
    """Between columns where `k_inner`, else between rows."""
    k_inner: bool
    """Whether it is the elements of a column that follow each other."""
    K: int
    """Rows, the inner dimension of the product."""
    N: int
    """Columns."""

    @property
    def align(self) -> int:
        """What divides all sizes and strides, at most 16."""
        return gcd(16, self.stride_e, self.stride, self.K, self.N)


def matrices(matrix_EKN: Tensor) -> Matrices:
    """Describe tensors of any strides; those with gaps in both directions are copied.

    Raises:
        ValueError: for matrices too large for offsets of 32 bits.
    """
    _, K, N = matrix_EKN.shape
    if K * N >= _MOST_ELEMENTS:
        raise ValueError(
            f"an expert's matrix of {K} x {N} has 2^31 elements or more; the kernels count them in 32 bits"
        )
    stride_e, stride_k, stride_n = matrix_EKN.stride()
    if (stride_k == 1 or K == 1) and 0 <= N * stride_n < _MOST_ELEMENTS:
        return Matrices(matrix_EKN, stride_e, stride_n, True, K, N)
    if (stride_n == 1 or N == 1) and 0 <= K * stride_k < _MOST_ELEMENTS:
        return Matrices(matrix_EKN, stride_e, stride_k, False, K, N)
    return Matrices(matrix_EKN.contiguous(), K * N, N, False, K, N)


def rows(tensor: Tensor) -> Tensor:
    """The same (R, C) with each row's elements following each other; rows may lie anywhere."""
    return tensor if tensor.stride(1) == 1 or tensor.shape[1] == 1 else tensor.contiguous()
