// Products of few tokens on vectors: rows of weights go from memory to the registers once, several at a time.
//
// One row read after the other leaves memory idle: what the processor fetches on its own ends with the page, so reading
// is fast only where several places far from each other are read at once. Hence a matrix is read as eight parts side by
// side, or four where more tokens need the registers. A row meets up to six tokens at once; if an expert has more, the
// same rows, by then in the cache, meet the next ones, and meanwhile the rows after these are asked for.
#pragma once
#include <algorithm>

#include "simd.h"

namespace crossways {

constexpr int MANY = 64;     // vectors at once, at most
constexpr int TOGETHER = 6;  // of these meet a row at once: the sums of four rows then fill the registers

// Sums of four vectors.
inline __m128 sums_of(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  const Vec all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Vectors of few tokens, and where the sums of each with all rows of a matrix are added.
struct Columns {
  const float* x[MANY];
  float* out[MANY];
};

// Rows that are multiplied at once: `apart` rows from each other, each of `width` values. Of some of them the row that
// comes next is asked for meanwhile.
template <class T>
struct Strip {
  const T* weights;
  int64_t apart, width, ahead0, ahead1;
  const T* row(int64_t r) const { return weights + r * apart * width; }
  void ask(int64_t k) const {
    if (k * sizeof(T) % 64) return;
    // GCC takes a function that only prefetches for one without effect and drops the call: hence assembly.
    for (int64_t r = ahead0; r < ahead1; r++) asm volatile("prefetcht0 %0" : : "m"(row(r)[width + k]));
  }
};

// Multiply `rows` rows by n vectors from number i0; sums of the first row are the r0-th.
template <int rows, int n, class S>
[[gnu::noinline]] void multiply(const S& strip, const Columns& columns, int64_t i0, int64_t r0) {
  Vec sum[rows < 4 ? 4 : rows][n] = {};
  const float* const* x = columns.x + i0;
  auto step = [&](int64_t k, __mmask16 mask) {
    Vec values[n];
#pragma GCC unroll 8
    for (int i = 0; i < n; i++) values[i] = load(x[i] + k, mask);
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
      const Vec weights = load(strip.row(r) + k, mask);
#pragma GCC unroll 8
      for (int i = 0; i < n; i++) sum[r][i] = _mm512_fmadd_ps(weights, values[i], sum[r][i]);
    }
    strip.ask(k);
  };
  int64_t k = 0;
  for (; k + 16 <= strip.width; k += 16) step(k, 0xffff);
  if (k < strip.width) step(k, first16(strip.width - k));
#pragma GCC unroll 8
  for (int i = 0; i < n; i++)
#pragma GCC unroll 2
    for (int r = 0; r < rows; r += 4) {  // of one row in the same order as of four
      alignas(16) float sums[4];
      _mm_store_ps(sums, sums_of(sum[r][i], sum[r + 1][i], sum[r + 2][i], sum[r + 3][i]));
      for (int j = 0; j < std::min(rows, 4); j++) columns.out[i0 + i][r0 + (r + j) * strip.apart] += sums[j];
    }
}
template <int rows, class S>
inline void multiply(const S& strip, const Columns& columns, int64_t i0, int64_t n, int64_t r0) {
  constexpr int fewer = std::min(rows, 4);  // callers with eight rows have at most three vectors
  switch (n) {
    case 1: return multiply<rows, 1>(strip, columns, i0, r0);
    case 2: return multiply<rows, 2>(strip, columns, i0, r0);
    case 3: return multiply<rows, 3>(strip, columns, i0, r0);
    case 4: return multiply<fewer, 4>(strip, columns, i0, r0);
    case 5: return multiply<fewer, 5>(strip, columns, i0, r0);
    default: return multiply<fewer, 6>(strip, columns, i0, r0);
  }
}

// Add the products of rows that lie one after the other with n vectors.
template <class T>
inline void multiply(const T* weights, int64_t rows, int64_t width, const Columns& columns, int64_t n) {
  const int64_t passes = (n + TOGETHER - 1) / TOGETHER, parts = n <= 3 ? 8 : 4, apart = rows / parts;
  for (int64_t r = 0; r < apart; r++)
    for (int64_t pass = 0; pass < passes; pass++) {
      const int64_t i = n * pass / passes, count = n * (pass + 1) / passes - i;
      const Strip<T> strip{weights + r * width, apart, width, parts * pass / passes, parts * (pass + 1) / passes};
      parts == 8 ? multiply<8>(strip, columns, i, count, r) : multiply<4>(strip, columns, i, count, r);
    }
  for (int64_t r = parts * apart; r < rows; r++)
    for (int64_t i = 0; i < n; i += TOGETHER)
      multiply<1>(Strip<T>{weights + r * width, 0, width, 0, 0}, columns, i, std::min<int64_t>(TOGETHER, n - i), r);
}

}  // namespace crossways
