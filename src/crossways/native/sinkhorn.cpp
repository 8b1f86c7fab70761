// Sinkhorn's iteration: scales of rows and columns at which every token supplies and every expert demands the same.
//
// The exponentials are rounded to float as PyTorch's softmax in double, rounded, would be, and all sums are in double,
// so that the column scales, rounded to float at the end, are those of the plain path whatever the order of summation.
//
// Legend: T tokens, E experts, G groups of N tokens, C chunks of a group's tokens.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double TINY = 1e-8;
// Tokens whose sums are added up on their own: the result is then the same with any number of threads.
constexpr int64_t CHUNK = 512;

inline __mmask8 lanes_of_8(int64_t left) { return left >= 8 ? 0xff : __mmask8((1u << left) - 1); }

// e^x of x <= 0, to 1e-14 of it: Taylor's series around the nearest multiple of log 2.
inline __m512d exponential(__m512d x) {
  x = _mm512_max_pd(x, _mm512_set1_pd(-800));
  const __m512d twos = _mm512_roundscale_pd(_mm512_mul_pd(x, _mm512_set1_pd(M_LOG2E)), _MM_FROUND_TO_NEAREST_INT);
  const __m512d rest = _mm512_fnmadd_pd(twos, _mm512_set1_pd(M_LN2), x);
  __m512d sum = _mm512_set1_pd(1.0 / 39916800);
  for (const double inverse : {1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720, 1.0 / 120, 1.0 / 24,
                               1.0 / 6, 0.5, 1.0, 1.0})
    sum = _mm512_fmadd_pd(sum, rest, _mm512_set1_pd(inverse));
  return _mm512_scalef_pd(sum, twos);
}

inline float lowest() { return -std::numeric_limits<float>::max() / 2; }

// Logits that are no number, or infinite, count as the lowest.
inline __m512 finite(const float* x, __mmask16 real) {
  const __m512 low = _mm512_set1_ps(lowest());
  const __m512 row = _mm512_mask_loadu_ps(low, real, x);
  const __mmask16 odd = _mm512_fpclass_ps_mask(row, 0x81 | 0x08);  // NaN, positive infinity
  return _mm512_max_ps(_mm512_mask_mov_ps(row, odd, low), low);
}

inline __mmask16 lanes_of_16(int64_t left) { return left >= 16 ? 0xffff : __mmask16((1u << left) - 1); }

// One token's softmax. `room` holds E numbers in whole vectors.
void softmax(const float* x, int64_t experts, double* room, float* mass) {
  __m512 most = _mm512_set1_ps(lowest());
  for (int64_t e = 0; e < experts; e += 16) most = _mm512_max_ps(most, finite(x + e, lanes_of_16(experts - e)));
  const __m512d top = _mm512_set1_pd(_mm512_reduce_max_ps(most));
  __m512d sum = _mm512_setzero_pd();
  for (int64_t e = 0; e < experts; e += 16) {
    const __m512 row = finite(x + e, lanes_of_16(experts - e));
    for (int half = 0; half < 2; half++) {
      const int64_t at = e + 8 * half;
      const __m256 part = half ? _mm512_extractf32x8_ps(row, 1) : _mm512_castps512_ps256(row);
      const __mmask8 real = at < experts ? lanes_of_8(experts - at) : 0;
      const __m512d power = _mm512_maskz_mov_pd(real, exponential(_mm512_sub_pd(_mm512_cvtps_pd(part), top)));
      _mm512_storeu_pd(room + at, power);
      sum = _mm512_add_pd(sum, power);
    }
  }
  const __m512d share = _mm512_set1_pd(1 / _mm512_reduce_add_pd(sum));
  for (int64_t e = 0; e < experts; e += 8)
    _mm256_mask_storeu_ps(mass + e, lanes_of_8(experts - e),
                          _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_loadu_pd(room + e), share)));
}

struct Problem {
  const float* mass;  // (N, E)
  int64_t n, experts;
  double rows;  // how many tokens take part

  __m512d at(int64_t t, int64_t e) const {
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(lanes_of_8(experts - e), mass + t * experts + e));
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

  void add_chunk(int64_t chunk, const double* scale, double* sums) const {
    int64_t t = chunk * CHUNK;
    const int64_t end = std::min(n, t + CHUNK);
    for (; t + 4 <= end; t += 4) add<4>(t, scale, sums);
    for (; t < end; t++) add<1>(t, scale, sums);
  }
};

// The columns' scales, (E in whole vectors).
std::vector<double> column_scales(const Problem& problem, int64_t most, double tolerance, int64_t threads) {
  const int64_t experts = problem.experts, wide = (experts + 7) / 8 * 8, chunks = (problem.n + CHUNK - 1) / CHUNK;
  std::vector<double> scale(wide, 1.0), sums(chunks * wide);
  for (int64_t round = 0; round < most; round++) {
    std::fill(sums.begin(), sums.end(), 0);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t chunk = 0; chunk < chunks; chunk++) problem.add_chunk(chunk, scale.data(), &sums[chunk * wide]);
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

extern "C" {

// balanced = a group's softmax times its column scales, infinite where a logit is no number or positive infinity.
// valid (T) says which tokens take part; null for all.
void crossways_sinkhorn(const float* logits, const uint8_t* valid, int64_t groups, int64_t n, int64_t experts,
                        int64_t most, double tolerance, float* balanced, int64_t threads) {
  const int64_t inner = groups < threads ? threads : 1;
#pragma omp parallel for num_threads(inner > 1 ? 1 : threads) schedule(static)
  for (int64_t g = 0; g < groups; g++) {
    const float* x = logits + g * n * experts;
    float* mass = balanced + g * n * experts;
    int64_t rows = 0;
#pragma omp parallel num_threads(inner) if (inner > 1)
    {
      std::vector<double> room((experts + 15) / 16 * 16);
#pragma omp for reduction(+ : rows)
      for (int64_t t = 0; t < n; t++) {
        const bool counts = !valid || valid[g * n + t];
        rows += counts;
        if (counts)
          softmax(x + t * experts, experts, room.data(), mass + t * experts);
        else
          std::fill_n(mass + t * experts, experts, 0.0f);
      }
    }
    const Problem problem{mass, n, experts, double(std::max<int64_t>(rows, 1))};
    const std::vector<double> scale = column_scales(problem, most, tolerance, inner);
    const std::vector<float> rounded(scale.begin(), scale.end());
#pragma omp parallel for num_threads(inner) if (inner > 1)
    for (int64_t t = 0; t < n; t++)
      for (int64_t e = 0; e < experts; e++) {
        const float logit = x[t * experts + e];
        const bool odd = logit != logit || logit == std::numeric_limits<float>::infinity();
        float& entry = mass[t * experts + e];
        entry = odd ? std::numeric_limits<float>::infinity() : entry * rounded[e];
      }
  }
}
}
