"""How what the kernels read must lie in memory: rows or columns without gaps, in vectors of 16 bytes.

Whatever lies otherwise is copied once, which costs less than reading it element by element in every tile.

Legend: T tokens, E experts, D model width, F expert width, K inner dimension and N columns of a product.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

_MOST_ELEMENTS = 2**31
_VECTOR = 16
_NARROW = 64
"""Below this width padding would cost more than it gives."""


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
    """Describe tensors of any strides; those that lie badly are copied.

    Raises:
        ValueError: for matrices too large for offsets of 32 bits.
    """
    _, K, N = matrix_EKN.shape
    if K * N >= _MOST_ELEMENTS:
        raise ValueError(f"an expert's matrix of {K} x {N} is too large: the kernels take fewer than 2^31 elements")
    stride_e, stride_k, stride_n = matrix_EKN.stride()
    if (stride_k == 1 or K == 1) and _lies_well(matrix_EKN, stride_n, N, K):
        return Matrices(matrix_EKN, stride_e, stride_n, True, K, N)
    if (stride_n == 1 or N == 1) and _lies_well(matrix_EKN, stride_k, K, N):
        return Matrices(matrix_EKN, stride_e, stride_k, False, K, N)
    return Matrices(matrix_EKN.clone(memory_format=torch.contiguous_format), K * N, N, False, K, N)


def rows(tensor: Tensor) -> Tensor:
    """The same (R, C) with each row's elements following each other; rows may be anywhere."""
    count, width = tensor.shape
    gapless = tensor.stride(1) == 1 or width == 1
    # Kernels find rows by 64 bits, so there may be any number.
    lies_well = gapless and _lies_well(tensor, tensor.stride(0), min(count, 1), width)
    return tensor if lies_well else tensor.clone(memory_format=torch.contiguous_format)


def _lies_well(tensor: Tensor, stride: int, count: int, width: int) -> bool:
    """Whether 32 bits reach `count` runs of `width` elements, and copying them would not align them better."""
    size = tensor.element_size()
    aligned = tensor.data_ptr() % _VECTOR == 0 and stride * size % _VECTOR == 0
    return count * stride < _MOST_ELEMENTS and (aligned or width * size % _VECTOR != 0)


def pad_widths(x_TD: Tensor, up_EHD: Tensor, down_EDF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with D and F rounded up to whole vectors by zeros, which change no result; unchanged if they are.

    Differentiable. Elements beyond D of what comes out are to be cut off.
    """
    vector = _VECTOR // x_TD.element_size()
    D, F = down_EDF.shape[1:]
    more_d, more_f = -D % vector, -F % vector
    if min(D, F) < _NARROW or not (more_d or more_f):
        return x_TD, up_EHD, down_EDF
    up = pad(up_EHD.unflatten(1, (-1, F)), (0, more_d, 0, more_f)).flatten(1, 2)
    return pad(x_TD, (0, more_d)), up, pad(down_EDF, (0, more_f, 0, more_d))
