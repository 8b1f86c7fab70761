"""sum[t] = the rows of t's pairs, added in float32 and in the same order every time.

Legend: T tokens, P pairs, D model width.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from crossways.experts.triton.plan import TokenPairs

_WIDEST = 1024


def token_sums(rows_PD: Tensor, pairs: TokenPairs) -> Tensor:
    """Contiguous rows (P, D) to (T, D), of the same dtype; zero for tokens without pairs."""
    tokens, width = pairs.start_T1.numel() - 1, rows_PD.shape[1]
    out_TD = rows_PD.new_empty(tokens, width)
    per_token = triton.cdiv(rows_PD.shape[0], max(tokens, 1))
    block_d = min(triton.next_power_of_2(width), _WIDEST)
    if tokens:
        token_sum_kernel[(tokens, triton.cdiv(width, block_d))](
            *(rows_PD, pairs.pair_P, pairs.start_T1, out_TD, width),
            BLOCK_P=min(triton.next_power_of_2(max(per_token, 1)), 8),
            BLOCK_D=block_d,
        )
    return out_TD


@triton.jit
def token_sum_kernel(rows_ptr, pair_ptr, start_ptr, out_ptr, D, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """One token by `BLOCK_D` columns; several rows are read at once to keep the memory busy."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    start, end = tl.load(start_ptr + token), tl.load(start_ptr + token + 1)
    sum = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for first in range(start, end, BLOCK_P):
        at = first + tl.arange(0, BLOCK_P)
        pair = tl.load(pair_ptr + at, mask=at < end, other=0)
        rows = tl.load(
            rows_ptr + pair[:, None] * D + d[None, :], mask=(at < end)[:, None] & (d < D)[None, :], other=0.0
        )
        sum += tl.sum(rows.to(tl.float32), 0)
    tl.store(out_ptr + token * D + d, sum.to(out_ptr.dtype.element_ty), mask=d < D)
