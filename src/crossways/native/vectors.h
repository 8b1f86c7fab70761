// One block of 32 x 32 in float32, on vectors of 16.
#pragma once
#include "operands.h"

namespace crossways {

// Left rows by threes: an address is then one of few pointers plus none, one or two times the distance of rows.
template <int rows>
struct Threes {
  const float* at[(rows + 2) / 3];
  int64_t row;
  Threes(const Left<float>& left, int r, int64_t s) : row(left.row) {
    const float* first = left.half[r / 16] + r % 16 * row + s * left.step;
    for (int i = 0; i < (rows + 2) / 3; i++) at[i] = first + 3 * i * row;
  }
  const float& operator()(int i, int64_t k) const { return (at[i / 3] + i % 3 * row)[k]; }
  void advance(int64_t count) {
    for (auto& one : at) {
      one += count;
      asm("" : "+r"(one));  // GCC would keep an address for every row instead, and run out of registers
    }
  }
};

// Add the products of one left value of each row, `k` after where `left` stands, with 16 or 32 right values.
template <bool both, int rows>
[[gnu::always_inline]] inline void outer(const Threes<rows>& left, int64_t k, const float* right, Vec sum[rows][2]) {
  Vec low = _mm512_loadu_ps(right), high = both ? _mm512_loadu_ps(right + 16) : Vec{};
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    Vec x = _mm512_set1_ps(left(i, k));
    asm("" : "+v"(x));  // GCC would load it twice instead, and loads would be the limit
    sum[i][0] = _mm512_fmadd_ps(x, low, sum[i][0]);
    if (both) sum[i][1] = _mm512_fmadd_ps(x, high, sum[i][1]);
  }
}

// Rows r and after of a block. Not inlined, so that all registers are free.
template <bool both, int rows>
[[gnu::noinline]] void rows_block(const Left<float>& left, int r, const uint32_t* b, const Right& right, int64_t from,
                                  int64_t to, const Out& out, bool add, Ahead& ahead) {
  Vec sum[rows][2] = {};
  float* const c = out.at + r * out.row;
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    if (add) sum[i][0] = _mm512_loadu_ps(c + i * out.row);
    if (add && both) sum[i][1] = _mm512_loadu_ps(c + i * out.row + 16);
  }
  for (int64_t s = from / SIDE; s * SIDE < to; s++) {
    Threes<rows> at(left, r, s);
    const float* words = reinterpret_cast<const float*>(b) + s * right.step;
    const int64_t depth = std::min<int64_t>(SIDE, to - s * SIDE);
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) outer<both, rows>(at, j, words + (k + j) * SIDE, sum);
      at.advance(4);
    }
    for (; k < depth; k++, at.advance(1)) outer<both, rows>(at, 0, words + k * SIDE, sum);
    ahead.fetch();
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    float* const to = c + i * out.row;
    if (out.past) {
      _mm512_stream_ps(to, sum[i][0]);
      if (both) _mm512_stream_ps(to + 16, sum[i][1]);
    } else {
      _mm512_storeu_ps(to, sum[i][0]);
      if (both) _mm512_storeu_ps(to + 16, sum[i][1]);
    }
  }
}

// One block of `rows` rows on vectors; with `both` false its right half is left as it is.
template <bool both>
inline void block(const Left<float>& left, const uint32_t* b, const Right& right, int64_t from, int64_t to,
                  const Out& out, bool add, Ahead& ahead, int64_t rows) {
  // 16 sums hide the latency of an addition; and many rows at once, that of reading weights for few tokens.
  constexpr int most = both ? 8 : 16;
  int64_t r = 0;
  for (; r + most / 2 < rows; r += most) rows_block<both, most>(left, r, b, right, from, to, out, add, ahead);
  if (r < rows) rows_block<both, most / 2>(left, r, b, right, from, to, out, add, ahead);
}

}  // namespace crossways
