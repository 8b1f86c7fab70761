// The columns' scales at which every token supplies and every expert demands the same: the rounds of Sinkhorn's iteration.
//
// All sums are in double, so that the scales, rounded to float at the end, are those of the plain path whatever the order
// of summation.
//
// Legend: E experts, N tokens of a group, C chunks of a group's tokens.
#pragma once
#include <vector>

#include "exponentials.h"

// Of the one file that includes this, so that all is inlined as if it stood there.
namespace {

constexpr double TINY = 1e-8;
// Tokens whose sums are added up on their own: the result is then the same with any number of threads.
constexpr int64_t CHUNK = 512;

// With `whole`, E is a multiple of 8, and masks that are known cost nothing.
template <bool whole>
inline __mmask8 lanes_of_8(int64_t left) {
  return whole || left >= 8 ? 0xff : __mmask8((1u << left) - 1);
}

template <bool whole>
struct Problem {
  const Rows& from;
  const float* mass;  // (N, E)
  int64_t n, experts;
  double rows;  // how many tokens take part

  __m512d at(int64_t t, int64_t e) const {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(lanes_of_8<whole>(experts - e), mass + t * experts + e));
  }

  // Adds what `count` tokens, 4 at most, give to the columns when their rows are scaled for these column scales.
  template <int count>
  void add(int64_t t, const double* scale, double* sums) const {
    __m512d dot[count], row[count];
    std::fill_n(dot, count, _mm512_setzero_pd());
    for (int64_t e = 0; e < experts; e += 8)
      for (int i = 0; i < count; i++) dot[i] = _mm512_fmadd_pd(at(t + i, e), _mm512_loadu_pd(scale + e), dot[i]);
    for (int i = 0; i < count; i++) row[i] = _mm512_set1_pd(1 / (rows * (_mm512_reduce_add_pd(dot[i]) + TINY)));
    for (int64_t e = 0; e < experts; e += 8) {
      __m512d sum = _mm512_loadu_pd(sums + e);
      for (int i = 0; i < count; i++) sum = _mm512_fmadd_pd(at(t + i, e), row[i], sum);
      _mm512_storeu_pd(sums + e, sum);
    }
  }

  // The same of pairs of tokens [t, end) where E is so many vectors: they are read and widened once, and the columns'
  // sums stay in registers.
  template <int vectors>
  void add_pairs(int64_t t, int64_t end, bool first, const double* scale, double* sums) const {
    __m512d sum[vectors];
    for (int v = 0; v < vectors; v++) sum[v] = _mm512_loadu_pd(sums + 8 * v);
    for (; t < end; t += 2) {
      for (int64_t i = t; first && i < t + 2; i++) from.fill(i);
      __m512d one[vectors], other[vectors], dot_one = _mm512_setzero_pd(), dot_other = dot_one;
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) {
        const __m512d by = _mm512_loadu_pd(scale + 8 * v);
        dot_one = _mm512_fmadd_pd(one[v] = at(t, 8 * v), by, dot_one);
        dot_other = _mm512_fmadd_pd(other[v] = at(t + 1, 8 * v), by, dot_other);
      }
      const __m512d row_one = _mm512_set1_pd(1 / (rows * (_mm512_reduce_add_pd(dot_one) + TINY)));
      const __m512d row_other = _mm512_set1_pd(1 / (rows * (_mm512_reduce_add_pd(dot_other) + TINY)));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++)
        sum[v] = _mm512_fmadd_pd(other[v], row_other, _mm512_fmadd_pd(one[v], row_one, sum[v]));
    }
    for (int v = 0; v < vectors; v++) _mm512_storeu_pd(sums + 8 * v, sum[v]);
  }

  // The `first` time, tokens are filled on the way.
  void add_chunk(int64_t chunk, bool first, const double* scale, double* sums) const {
    int64_t t = chunk * CHUNK;
    const int64_t end = std::min(n, t + CHUNK), even = end - (end - t) % 2;
    if (experts == 64) add_pairs<8>(t, even, first, scale, sums), t = even;
    if (experts == 32) add_pairs<4>(t, even, first, scale, sums), t = even;
    if (experts == 16) add_pairs<2>(t, even, first, scale, sums), t = even;
    for (; t + 4 <= end; t += 4) {
      for (int64_t i = t; first && i < t + 4; i++) from.fill(i);
      add<4>(t, scale, sums);
    }
    for (; t < end; t++) {
      if (first) from.fill(t);
      add<1>(t, scale, sums);
    }
  }

  // Every chunk's sums (C, wide).
  void add_all(bool first, const double* scale, double* sums, int64_t wide, int64_t threads) const {
    const int64_t chunks = (n + CHUNK - 1) / CHUNK;
    if (threads == 1) {
      for (int64_t chunk = 0; chunk < chunks; chunk++) add_chunk(chunk, first, scale, sums + chunk * wide);
      return;
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) add_chunk(chunk, first, scale, sums + chunk * wide);
  }
};

// The columns' scales, (E in whole vectors).
template <bool whole>
std::vector<double> column_scales(const Problem<whole>& problem, int64_t most, double tolerance, int64_t threads) {
  const int64_t experts = problem.experts, wide = (experts + 7) / 8 * 8, chunks = (problem.n + CHUNK - 1) / CHUNK;
  std::vector<double> scale(wide, 1.0), sums(chunks * wide);
  for (int64_t round = 0; round < most; round++) {
    std::fill(sums.begin(), sums.end(), 0);
    problem.add_all(round == 0, scale.data(), sums.data(), wide, threads);
    double change = 0;
    for (int64_t e = 0; e < experts; e++) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; chunk++) sum += sums[chunk * wide + e];
      const double fresh = 1 / (double(experts) * (sum + TINY));
      change += std::abs(fresh - scale[e]);
      scale[e] = fresh;
    }
    if (change / double(experts) < tolerance) break;
  }
  return scale;
}

}  // namespace
