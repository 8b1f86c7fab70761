"""What the kernels that walk over tiles of rows have in common; Triton inlines these functions.

Legend: P pairs, E experts, G tiles, M rows and N columns of a tile, K inner dimension of a product.
"""

import triton
import triton.language as tl


@triton.jit
def part_of_program(
    tile_expert_ptr,
    tile_row_ptr,
    offsets_ptr,
    tiles,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """(expert, first pair, rows from there, which of them are the expert's, column tile); expert -1, and nothing else
    of use, for a program with nothing to do.

    `GROUP_M` row tiles take turns with each column tile, so that programs that run at the same time find each other's
    rows and matrices in the L2 cache. The first pair has 64 bits: what is computed from it may pass 2^31.
    """
    tiles_n = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    in_group = GROUP_M * tiles_n
    first_m = (program // in_group) * GROUP_M
    group = tl.minimum(tiles - first_m, GROUP_M)
    tile = first_m + (program % in_group) % group
    expert = tl.load(tile_expert_ptr + tile)
    first = tl.load(tile_row_ptr + tile).to(tl.int64)
    end = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
    row = tl.arange(0, BLOCK_M)
    return expert, first, row, row < (end - first).to(tl.int32), (program % in_group) // group


@triton.jit
def product(
    a_at,
    matrix,
    stride,
    n,
    real,
    K,
    N,
    K_INNER: tl.constexpr,
    UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The `real` rows at `a_at` (M, K), whose elements follow each other, times columns `n` of a matrix (K, N), in
    float32."""
    k = tl.arange(0, BLOCK_K)
    b_at = element(matrix, stride, k[:, None], n[None, :], K_INNER)
    sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for done in range(0, K, BLOCK_K):
        inside = k < K - done
        a = tl.load(a_at, mask=real[:, None] & inside[None, :], other=0.0)
        b = tl.load(b_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        sum = multiply(a, b, sum, UPCAST, PRECISION)
        a_at += BLOCK_K
        b_at = element(b_at, stride, BLOCK_K, 0, K_INNER)
    return sum


@triton.jit
def element(start, stride, k, n, K_INNER: tl.constexpr):
    """Where element (k, n) of a matrix lies: `stride` is that of n where elements of one column follow each other
    (`K_INNER`), else that of k."""
    if K_INNER:
        return start + n * stride + k
    return start + k * stride + n


@triton.jit
def multiply(a, b, sum, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """sum + a b in float32. `UPCAST` is for Triton's interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def multiple(x, OF: tl.constexpr):
    """x, of which the compiler shall know that `OF` divides it: by itself it sees multiples of 16 alone, and without
    knowing it loads element by element what it could load in 16 bytes."""
    return x // OF * OF
