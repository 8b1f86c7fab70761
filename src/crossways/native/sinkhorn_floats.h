// Sinkhorn's choice in floats, where it is certain to be that of `column_scales.h`: of at most 64 experts in whole
// vectors, when all take part and all logits are finite.
//
// All that is added up is positive, so that errors stay as small a part of it as roundings are; those of earlier rounds
// die away as fast as the iteration converges. An exponential is the less exact the farther its logit lies below the
// greatest of the token, which for entries that matter is about as far as scales lie apart. What is taken for certain
// leaves room for several times the errors that are found. Where a choice, or whether to stop, hangs on less, doubles
// decide.
//
// Legend: E experts, N tokens of a group, C chunks of a group's tokens.
#pragma once
#include "column_scales.h"
#include "sixteen.h"

// Of the one file that includes this, so that all is inlined as if it stood there.
namespace {

// 2^x to 2e-7 of it, for x <= 0: the polynomial of degree 5 that meets 2^x at the Chebyshev points of [0, 1].
inline __m512 power_of_2(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF);  // above the whole number below
  __m512 sum = _mm512_set1_ps(0.0018937540582736276f);
  for (const float next :
       {0.008949590423165756f, 0.055860337077394316f, 0.24014181820139016f, 0.6931544896632381f, 0.9999998983500242f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(next));
  return _mm512_scalef_ps(sum, x);
}

// Of four rows each: their lanes joined by `join`.
template <class Join4, class Join16>
inline __m128 across(const __m512* row, Join16 join, Join4 join_last) {
  auto two = [&](__m512 a, __m512 b) { return join(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const __m512d low = _mm512_castps_pd(two(row[0], row[1])), high = _mm512_castps_pd(two(row[2], row[3]));
  const __m512 four =
      join(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)), _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  return join_last(join_last(_mm512_castps512_ps128(four), _mm512_extractf32x4_ps(four, 1)),
                   join_last(_mm512_extractf32x4_ps(four, 2), _mm512_extractf32x4_ps(four, 3)));
}

inline __m128 sums_of_4(const __m512* row) {
  return across(row, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); },
                [](__m128 a, __m128 b) { return _mm_add_ps(a, b); });
}

inline __m128 greatest_of_4(const __m512* row) {
  return across(row, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); },
                [](__m128 a, __m128 b) { return _mm_max_ps(a, b); });
}

inline __m512 everywhere(__m128 four, int i) {
  return _mm512_permutexvar_ps(_mm512_set1_epi32(i), _mm512_castps128_ps512(four));
}

// One group, by so many threads. E is so many vectors.
template <int vectors>
struct InFloats {
  static constexpr int64_t EXPERTS = 16 * vectors;
  const float* x;  // (N, E)
  int64_t n;       // in whole fours
  float* mass;     // (N, E)
  int64_t threads;
  std::vector<float> scale = std::vector<float>(EXPERTS, 1.0f);
  std::vector<double> sums = std::vector<double>((n + CHUNK - 1) / CHUNK * EXPERTS);
  std::vector<float> lowest = std::vector<float>((n + CHUNK - 1) / CHUNK);  // of each chunk's exponents
  double doubt = 1;  // by what part of themselves the scaled entries of a token may be off against each other

  // Exponentials of four tokens, which are written down.
  void fill(int64_t t, __m512 (*row)[vectors], __m512* low) const {
    __m512 top[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      __builtin_prefetch(x + (t + 16 + i) * EXPERTS), __builtin_prefetch(x + (t + 16 + i) * EXPERTS + 32);
      top[i] = row[i][0] = _mm512_loadu_ps(x + (t + i) * EXPERTS);
      for (int v = 1; v < vectors; v++) {
        if (v % 2) __builtin_prefetch(x + (t + 16 + i) * EXPERTS + 16 * v);
        top[i] = _mm512_max_ps(top[i], row[i][v] = _mm512_loadu_ps(x + (t + i) * EXPERTS + 16 * v));
      }
    }
    const __m512 to_2 = _mm512_set1_ps(1.44269504088896f);
    const __m128 most = _mm_mul_ps(greatest_of_4(top), _mm_set1_ps(1.44269504088896f));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512 less = everywhere(most, i);
      for (int v = 0; v < vectors; v++) {
        const __m512 exponent = _mm512_fmsub_ps(row[i][v], to_2, less);
        *low = _mm512_min_ps(*low, exponent);
        row[i][v] = power_of_2(exponent);
        _mm512_storeu_ps(mass + (t + i) * EXPERTS + 16 * v, row[i][v]);
      }
    }
  }

  // Adds what four tokens give to the columns when their rows are scaled for these column scales.
  template <bool first>
  void add_four(int64_t t, __m512* sum, __m512* low) const {
    __m512 row[4][vectors], dot[4];
    if (first) fill(t, row, low);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      dot[i] = _mm512_setzero_ps();
      for (int v = 0; v < vectors; v++) {
        if (!first) row[i][v] = _mm512_loadu_ps(mass + (t + i) * EXPERTS + 16 * v);
        dot[i] = _mm512_fmadd_ps(row[i][v], _mm512_loadu_ps(&scale[16 * v]), dot[i]);
      }
    }
    const __m128 by = _mm_div_ps(_mm_set1_ps(1.0f), _mm_add_ps(sums_of_4(dot), _mm_set1_ps(float(TINY))));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
      for (int v = 0; v < vectors; v++) sum[v] = _mm512_fmadd_ps(row[i][v], everywhere(by, i), sum[v]);
  }

  // Sums of floats are short, so that they are nearly those of doubles.
  template <bool first>
  void add_chunk(int64_t chunk) {
    constexpr int64_t SHORT = 8;
    __m512 low = _mm512_setzero_ps();
    __m512d total[2 * vectors];
    for (__m512d& one : total) one = _mm512_setzero_pd();
    const int64_t end = std::min(n, (chunk + 1) * CHUNK);
    for (int64_t t = chunk * CHUNK; t < end; t += SHORT) {
      __m512 sum[vectors];
      for (__m512& one : sum) one = _mm512_setzero_ps();
      add_four<first>(t, sum, &low);
      if (t + 4 < end) add_four<first>(t + 4, sum, &low);
      for (int v = 0; v < vectors; v++) {
        total[2 * v] = _mm512_add_pd(total[2 * v], _mm512_cvtps_pd(_mm512_castps512_ps256(sum[v])));
        total[2 * v + 1] = _mm512_add_pd(total[2 * v + 1], _mm512_cvtps_pd(_mm512_extractf32x8_ps(sum[v], 1)));
      }
    }
    for (int v = 0; v < 2 * vectors; v++) _mm512_storeu_pd(&sums[chunk * EXPERTS + 8 * v], total[v]);
    if (first) lowest[chunk] = _mm512_reduce_min_ps(low);
  }

  void add_all(bool first) {
    const int64_t chunks = lowest.size();
    auto add = [&](int64_t chunk) { first ? add_chunk<true>(chunk) : add_chunk<false>(chunk); };
    if (threads == 1) {
      for (int64_t chunk = 0; chunk < chunks; chunk++) add(chunk);
      return;
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t chunk = 0; chunk < chunks; chunk++) add(chunk);
  }

  // Finds the scales, and how certain they are. False if doubles might find others.
  bool balance(int64_t most, double tolerance) {
    constexpr double FAR_OFF = 1e15;
    double before = FAR_OFF;  // the change of the last round
    for (int64_t round = 0; round < most; round++) {
      add_all(round == 0);
      if (!(*std::min_element(lowest.begin(), lowest.end()) > -60)) return false;
      double change = 0, size = 0, least = FAR_OFF, greatest = 0;
      for (int64_t e = 0; e < EXPERTS; e++) {
        double sum = 0;
        for (size_t chunk = 0; chunk < lowest.size(); chunk++) sum += sums[chunk * EXPERTS + e];
        const double fresh = 1 / (double(EXPERTS) * (sum / double(n) + TINY));
        if (!(fresh < FAR_OFF)) return false;
        change += std::abs(fresh - scale[e]), size += fresh + scale[e];
        least = std::min(least, fresh), greatest = std::max(greatest, fresh);
        scale[e] = float(fresh);
      }
      if (!(least > 1 / FAR_OFF && change < before)) return false;
      doubt = 1e-6 * (3 + std::log2(greatest / least)) / (1 - change / before);
      before = change;
      const double limit = tolerance * double(EXPERTS);
      if (round + 1 < most && std::abs(change - limit) < doubt / 2 * size) return false;
      if (change < limit) break;
    }
    return true;
  }

  // Writes each token's greatest, of tokens whose words begin there. False if doubles might choose another.
  bool choose_greatest(uint64_t* word) const {
    const float sure = float(1 - doubt);
    uint64_t others = 0;
#pragma omp parallel for num_threads(threads) reduction(| : others)
    for (int64_t t = 0; t < n; t += 4) {
      __m512 row[4][vectors], top[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        for (int v = 0; v < vectors; v++) {
          const __m512 entry = _mm512_loadu_ps(mass + (t + i) * EXPERTS + 16 * v);
          row[i][v] = _mm512_mul_ps(entry, _mm512_loadu_ps(&scale[16 * v]));
          top[i] = v ? _mm512_max_ps(top[i], row[i][v]) : row[i][0];
        }
      }
      const __m128 line = _mm_mul_ps(greatest_of_4(top), _mm_set1_ps(sure));
#pragma GCC unroll 4
      for (int i = 0; i < 4; i++) {
        uint64_t found = 0;
        for (int v = 0; v < vectors; v++)
          found |= uint64_t(_mm512_cmp_ps_mask(row[i][v], everywhere(line, i), _CMP_GE_OQ)) << 16 * v;
        word[t + i] = found;
        others |= found & (found - 1);
      }
    }
    return !others;
  }

  // The same of each token's k greatest; the first of them is token `begin` of all.
  bool choose(const Bits& bits, int64_t begin, int64_t k) const {
    const __m512 sure = _mm512_set1_ps(float(1 - doubt));
    int unsure = 0;
#pragma omp parallel num_threads(threads) reduction(| : unsure)
    {
      Sixteen found(EXPERTS, k);
#pragma omp for schedule(static)
      for (int64_t first = 0; first < n; first += 16) {
        const int64_t count = std::min<int64_t>(16, n - first);
        found.load(Allowed(nullptr, EXPERTS), begin + first, count, [&](int64_t i, int64_t piece, __mmask16) {
          const __m512 entry = _mm512_loadu_ps(mass + (first + i) * EXPERTS + 16 * piece);
          return _mm512_castps_si512(_mm512_mul_ps(entry, _mm512_loadu_ps(&scale[16 * piece])));
        });
        found.rank(k);
        put_open(bits, found, begin + first, count, k);
        const __m512 line = _mm512_mul_ps(_mm512_castsi512_ps(found.best[k - 1]), sure);
        __m512i near = _mm512_setzero_si512();
        for (int64_t e = 0; e < EXPERTS; e++) {
          const __mmask16 reaches = _mm512_cmp_ps_mask(_mm512_castsi512_ps(found.keys[e]), line, _CMP_GE_OQ);
          near = _mm512_mask_add_epi32(near, reaches, near, _mm512_set1_epi32(1));
        }
        unsure |= _mm512_mask_cmpneq_epi32_mask(lanes(count), near, _mm512_set1_epi32(int32_t(k)));
      }
    }
    return !unsure;
  }

  bool solve(const Bits& bits, int64_t begin, int64_t k, int64_t most, double tolerance) {
    if (!balance(most, tolerance)) return false;
    return k == 1 ? choose_greatest(bits.of(begin)) : choose(bits, begin, k);
  }
};

// Bits of each token's k greatest in floats, of a group that begins with token `begin` of all. False, and nothing of
// use, where that is not certain to be right, or not written for this shape. `mass` (N, E) is room.
inline bool chosen_in_floats(const float* x, int64_t n, int64_t experts, float* mass, const Bits& bits, int64_t begin,
                             int64_t k, int64_t most, double tolerance, int64_t threads) {
  // Of many experts a token there are many near the last one, so that doubles would often have to decide.
  if (k > 2 || n % 4 || n == 0) return false;
  switch (experts) {
    case 16: return InFloats<1>{x, n, mass, threads}.solve(bits, begin, k, most, tolerance);
    case 32: return InFloats<2>{x, n, mass, threads}.solve(bits, begin, k, most, tolerance);
    case 64: return InFloats<4>{x, n, mass, threads}.solve(bits, begin, k, most, tolerance);
    default: return false;
  }
}

}  // namespace
