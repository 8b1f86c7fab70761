"""What the kernels that walk over tiles of rows have in common.

Legend: P pairs, E experts, G tiles, M rows and N columns of a tile.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of this program: `GROUP_M` row tiles take turns with each column tile, so that programs
    that run at the same time find each other's rows and matrices in the L2 cache."""
    program = tl.program_id(0)
    in_group = GROUP_M * tiles_n
    first_m = (program // in_group) * GROUP_M
    rows = tl.minimum(tiles_m - first_m, GROUP_M)
    return first_m + (program % in_group) % rows, (program % in_group) // rows


@triton.jit
def rows_of_tile(tile, tile_expert_ptr, tile_row_ptr, offsets_ptr):
    """(expert, first pair, number of pairs from there to the expert's last); expert -1, and nothing else of use, for
    a tile with nothing to do."""
    expert = tl.load(tile_expert_ptr + tile)
    first = tl.load(tile_row_ptr + tile).to(tl.int64)
    end = tl.load(offsets_ptr + tl.maximum(expert, 0) + 1)
    return expert, first, (end - first).to(tl.int32)


@triton.jit
def multiply(a, b, sum, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """sum + a b in float32. `UPCAST` is for Triton's interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision=PRECISION)
