// Products of few tokens on the matrix unit, in bfloat16: sixteen rows of weights, where they lie, are one operand, the
// vectors of sixteen tokens the other.
//
// As in few_rows.h, the rows of one tile lie far apart, so that memory is read in sixteen places at once, and of each
// place the row that comes next is asked for meanwhile.
#pragma once
#include "few_rows.h"
#include "rows.h"

namespace crossways {

constexpr int64_t TILE = 16;  // rows of a tile, and its columns: tokens

// Words (two values each) that `width` values take for a group of sixteen tokens: [width / 2][16].
inline int64_t words_of_group(int64_t width) { return round_up(width, 2 * TILE) / 2 * TILE; }

// Rows of n tokens to such words, group after group; zero where there is no token, or no value.
inline void pack_words(const bf16* const* rows, int64_t n, int64_t width, uint32_t* words) {
  Words square[16];
  for (int64_t first = 0; first < n; first += TILE, words += words_of_group(width)) {
    const bf16* sixteen[TILE] = {};
    std::copy(rows + first, rows + std::min(n, first + TILE), sixteen);
    for (int64_t at = 0; at < width; at += 2 * TILE) {
      load_square(sixteen, at, width, square);
      transpose(square);
      for (int64_t i = 0; i < TILE; i++) _mm512_storeu_si512(words + (at / 2 + i) * TILE, square[i]);
    }
  }
}

#ifdef __AMX_BF16__

// Sixteen rows of weights, `row` values from each other; what of them goes beyond the last whole step of 32 values lies
// at tail[16][32], with zeros, if given.
struct TileRows {
  const bf16* weights;
  int64_t row, width;
  const bf16* tail;
  bool ask;  // whether other rows follow these
};

// out[group] = their products with one to four groups of sixteen tokens; rows of a result are `step` floats apart.
template <int groups>
[[gnu::noinline]] void tile_products(const TileRows& rows, const uint32_t* words, float* out, int64_t step,
                                     int64_t out_group) {
  const int64_t group = words_of_group(rows.width);
  _tile_zero(0);
  if constexpr (groups > 1) _tile_zero(1);
  if constexpr (groups > 2) _tile_zero(2);
  if constexpr (groups > 3) _tile_zero(3);
  for (int64_t k = 0; k < rows.width; k += 2 * TILE, words += TILE * TILE) {
    if (rows.tail && k + 2 * TILE > rows.width)
      _tile_loadd(4, rows.tail, 4 * TILE);
    else
      _tile_loadd(4, rows.weights + k, 2 * rows.row);
    _tile_loadd(5, words, 4 * TILE);
    _tile_dpbf16ps(0, 4, 5);
    if constexpr (groups > 1) _tile_loadd(6, words + group, 4 * TILE);
    if constexpr (groups > 1) _tile_dpbf16ps(1, 4, 6);
    if constexpr (groups > 2) _tile_loadd(7, words + 2 * group, 4 * TILE);
    if constexpr (groups > 2) _tile_dpbf16ps(2, 4, 7);
    if constexpr (groups > 3) _tile_loadd(5, words + 3 * group, 4 * TILE);
    if constexpr (groups > 3) _tile_dpbf16ps(3, 4, 5);
    for (int64_t r = 0; rows.ask && r < TILE; r++)  // to the second level: in the first, rows so far apart collide
      asm volatile("prefetcht1 %0" : : "m"(rows.weights[r * rows.row + rows.width + k]));
  }
  _tile_stored(0, out, 4 * step);
  if constexpr (groups > 1) _tile_stored(1, out + out_group, 4 * step);
  if constexpr (groups > 2) _tile_stored(2, out + 2 * out_group, 4 * step);
  if constexpr (groups > 3) _tile_stored(3, out + 3 * out_group, 4 * step);
}
inline void tile_products(const TileRows& rows, const uint32_t* words, int64_t n, float* out, int64_t step,
                          int64_t out_group) {
  switch ((n + TILE - 1) / TILE) {
    case 1: return tile_products<1>(rows, words, out, step, out_group);
    case 2: return tile_products<2>(rows, words, out, step, out_group);
    case 3: return tile_products<3>(rows, words, out, step, out_group);
    default: return tile_products<4>(rows, words, out, step, out_group);
  }
}

// out[group][row][16] = products of `rows` rows of weights, one after the other, with n tokens (at most MANY) of
// `words`; a group has as many rows as is a multiple of sixteen. `packed` has room for sixteen rows.
inline void multiply_tiles(const bf16* weights, int64_t rows, int64_t width, const uint32_t* words, int64_t n,
                           float* out, bf16* packed) {
  const int64_t apart = rows / TILE, rest = rows % TILE, whole = width / (2 * TILE) * 2 * TILE;
  const int64_t padded = round_up(width, 2 * TILE), out_group = round_up(rows, TILE) * TILE;
  alignas(64) bf16 tail[TILE * 2 * TILE] = {};
  for (int64_t i = 0; i < apart; i++) {
    const TileRows strip{weights + i * width, apart * width, width, whole < width ? tail : nullptr, i + 1 < apart};
    for (int64_t r = 0; strip.tail && r < TILE; r++)
      std::copy(strip.weights + r * strip.row + whole, strip.weights + r * strip.row + width, tail + r * 2 * TILE);
    tile_products(strip, words, n, out + i * TILE, apart * TILE, out_group);
  }
  if (!rest) return;
  std::fill_n(packed, TILE * padded, bf16{});
  for (int64_t r = 0; r < rest; r++)
    std::copy_n(weights + (apart * TILE + r) * width, width, packed + r * padded);
  tile_products({packed, padded, padded, nullptr, false}, words, n, out + apart * TILE * TILE, TILE, out_group);
}

#else
inline void multiply_tiles(const bf16*, int64_t, int64_t, const uint32_t*, int64_t, float*, bf16*) {}
#endif

}  // namespace crossways
