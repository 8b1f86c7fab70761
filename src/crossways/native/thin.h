// Float32 products by few columns.
#pragma once
#include "operands.h"

namespace crossways {

// At most THIN columns of a float32 panel, one after the other. The products of few tokens read
// weights as fast as memory gives them only when they read one row after the other.
constexpr int THIN = 16;
inline int64_t thin_stride(int64_t depth) { return round_up(depth, SIDE) + 16; }  // not all in one set of the cache
inline void thin_columns(const float* panel, int64_t depth, float* out) {
  const int64_t stride = thin_stride(depth);
  Words square[16];
  for (int64_t k = 0; k < round_up(depth, SIDE); k += 16) {
    for (int i = 0; i < 16; i++) square[i] = _mm512_loadu_si512(panel + (k + i) * SIDE);
    transpose(square);
    for (int i = 0; i < THIN; i++) _mm512_storeu_si512(out + i * stride + k, square[i]);
  }
}

template <int columns>
inline void thin_block(const Left<float>& a, const float* b, int64_t stride, int64_t depth, float* c) {
  for (int r = 0; r < SIDE; r++) {
    const float* row = a.half[r / 16] + r % 16 * a.row;
    Vec sum[columns] = {};
    for (int64_t k = 0; k < depth; k += 16) {
      Vec x = load(row + k / SIDE * a.step + k % SIDE, first16(depth - k));
#pragma GCC unroll 16
      for (int i = 0; i < columns; i++) sum[i] = _mm512_fmadd_ps(x, _mm512_loadu_ps(b + i * stride + k), sum[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < columns; i++) c[r * SIDE + i] = _mm512_reduce_add_ps(sum[i]);
  }
}

inline void thin_product(const Left<float>& a, const float* b, int64_t columns, int64_t depth, float* c) {
  const int64_t stride = thin_stride(depth);
  if (columns == 1) return thin_block<1>(a, b, stride, depth, c);
  if (columns == 2) return thin_block<2>(a, b, stride, depth, c);
  if (columns <= 4) return thin_block<4>(a, b, stride, depth, c);
  if (columns <= 8) return thin_block<8>(a, b, stride, depth, c);
  thin_block<THIN>(a, b, stride, depth, c);
}
inline void thin_product(const Left<bf16>&, const float*, int64_t, int64_t, float*) {}

}  // namespace crossways
