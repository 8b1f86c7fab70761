// Float32 products by few columns: those that do not fill a vector.
//
// A vector of 16 columns takes as long for one as for 16, so up to THIN columns, the last of many or all there are, are
// multiplied the other way: vectors go along the left rows.
#pragma once
#include "few_rows.h"
#include "operands.h"

namespace crossways {

// Up to how many columns are thin: beside others, and alone, where reading the left rows takes longer anyway.
constexpr int THIN = 10, THIN_ALONE = 16;

// How many of `columns` columns, the last ones, are thin.
inline int64_t thin_of(int64_t columns) {
  const int64_t rest = columns % 16;
  return columns <= THIN_ALONE ? columns : rest <= THIN ? rest : 0;
}
inline int64_t thin_of(const Left<float>& left, const Right& right, int64_t columns) {
  return right.thin && left.step == SIDE ? thin_of(columns) : 0;
}
inline int64_t thin_of(const Left<bf16>&, const Right&, int64_t) { return 0; }

// Thin columns one after the other: distance from one to the next, not all in one set of the cache.
inline int64_t thin_stride(int64_t depth) { return round_up(depth, SIDE) + 16; }
// Column `first` and those after it, up to the next multiple of 16, of a float32 panel.
inline void thin_columns(const float* panel, int64_t first, int64_t depth, float* out) {
  const int64_t stride = thin_stride(depth);
  Words square[16];
  for (int64_t k = 0; k < round_up(depth, SIDE); k += 16) {
    for (int i = 0; i < 16; i++) square[i] = _mm512_loadu_si512(panel + (k + i) * SIDE + first);
    transpose(square);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * stride + k, square[i]);
  }
}

// Some left rows that are multiplied at once.
struct ThinStrip {
  const float* first;
  int64_t distance, width, apart;  // from row to row: of the left operand, its length, of the sums
  Ahead& ahead;
  const float* row(int64_t r) const { return first + r * distance; }
  void ask(int64_t k) const {
    if (k % SIDE == 0) ahead.fetch();
  }
};

// The number of steps at which `thin_block` fetches, for every 32 summed values.
inline int64_t thin_steps(int64_t columns) {
  return columns <= 3 ? SIDE / 8 : SIDE / 4 * ((columns + TOGETHER - 1) / TOGETHER);
}

// `count` columns, one after the other at `columns`, to columns of a block that begin at `out`.
inline void thin_block(const Left<float>& left, const float* columns, int64_t count, int64_t depth, const Out& out,
                       Ahead& ahead) {
  Columns to;
  for (int64_t i = 0; i < count; i++) to.x[i] = columns + i * thin_stride(depth), to.out[i] = out.at + i;
  for (int64_t r = 0; r < SIDE; r++) std::fill_n(out.at + r * out.row, count, 0.0f);
  const int64_t rows = count <= 3 ? 8 : 4;
  for (int64_t r = 0; r < SIDE; r += rows) {
    const ThinStrip strip{left.half[r / 16] + r % 16 * left.row, left.row, depth, out.row, ahead};
    for (int64_t i = 0; i < count; i += TOGETHER) {
      const int64_t n = std::min<int64_t>(TOGETHER, count - i);
      rows == 8 ? multiply<8>(strip, to, i, n, r * out.row) : multiply<4>(strip, to, i, n, r * out.row);
    }
  }
}

inline void thin_block(const Left<bf16>&, const float*, int64_t, int64_t, const Out&, Ahead&) {}

}  // namespace crossways
