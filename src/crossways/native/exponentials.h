// The rows that Sinkhorn's iteration scales: exponentials of double, rounded to float.
//
// Legend: E experts, N tokens of a group.
#pragma once
#include <atomic>
#include <cmath>

#include "bits.h"

// Of the one file that includes this, so that all is inlined as if it stood there.
namespace {

// 2^x, to 2e-14 of it: the polynomial of degree 9 that meets 2^x at the Chebyshev points of [0, 1].
inline __m512d power_of_2(__m512d x) {
  const __m512d rest = _mm512_reduce_pd(x, _MM_FROUND_TO_NEG_INF);  // above the whole number below
  __m512d sum = _mm512_set1_pd(1.443332993631049e-07);
  for (const double next :
       {1.2256971666571848e-06, 1.5368748551205598e-05, 0.0001539514494422027, 0.001333393101106112,
        0.009618119050163078, 0.05550411021933063, 0.2402265068372975, 0.6931471805636421, 0.9999999999999815})
    sum = _mm512_fmadd_pd(sum, rest, _mm512_set1_pd(next));
  return _mm512_scalef_pd(sum, x);
}

constexpr int ODD = 0x81 | 0x08;  // classes of floats: both kinds of NaN, positive infinity

inline float lowest() { return -std::numeric_limits<float>::max() / 2; }

// Logits that are no number, or infinite, count as the lowest.
inline __m512 finite(const float* x, __mmask16 real) {
  const __m512 low = _mm512_set1_ps(lowest());
  const __m512 row = _mm512_mask_loadu_ps(low, real, x);
  const __mmask16 odd = _mm512_fpclass_ps_mask(row, ODD);
  return _mm512_max_ps(_mm512_mask_mov_ps(row, odd, low), low);
}

// Of eight logits, less the greatest of the token's so that nothing overflows; rows are scaled anyway. Not in one
// operation with the factor: of logits near the lowest, what that leaves unrounded is larger than all of them.
inline __m256 powers(__m256 row, __m512d top) {
  const __m512d below = _mm512_sub_pd(_mm512_cvtps_pd(row), top);
  return _mm512_cvtpd_ps(power_of_2(_mm512_mul_pd(below, _mm512_set1_pd(M_LOG2E))));
}

// Of one token's logits. Returns whether some logit is no number or positive infinity.
bool odd_exponentials(const float* x, int64_t experts, float* mass) {
  __m512 most = _mm512_set1_ps(lowest());
  __mmask16 odd = 0;
  for (int64_t e = 0; e < experts; e += 16) {
    const __mmask16 real = lanes(experts - e);
    most = _mm512_max_ps(most, finite(x + e, real));
    odd |= _mm512_mask_fpclass_ps_mask(real, _mm512_maskz_loadu_ps(real, x + e), ODD);
  }
  const __m512d top = _mm512_set1_pd(_mm512_reduce_max_ps(most));
  for (int64_t e = 0; e < experts; e += 16) {
    const __mmask16 real = lanes(experts - e);
    const __m512 row = finite(x + e, real);
    const __m256 low = powers(_mm512_castps512_ps256(row), top), high = powers(_mm512_extractf32x8_ps(row, 1), top);
    _mm512_mask_storeu_ps(mass + e, real, _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1));
  }
  return odd;
}

// The same, fast where all logits are finite and fill whole vectors.
bool exponentials(const float* x, int64_t experts, float* mass) {
  constexpr int NOT_FINITE = ODD | 0x10;
  if (experts % 16) return odd_exponentials(x, experts, mass);
  __m512 most = _mm512_loadu_ps(x);
  __mmask16 odd = 0;
  for (int64_t e = 0; e < experts; e += 16) {
    __builtin_prefetch(x + 16 * experts + e);
    const __m512 row = _mm512_loadu_ps(x + e);
    odd |= _mm512_fpclass_ps_mask(row, NOT_FINITE) | _mm512_cmp_ps_mask(row, _mm512_set1_ps(lowest()), _CMP_LT_OQ);
    most = _mm512_max_ps(most, row);
  }
  if (odd) return odd_exponentials(x, experts, mass);
  const __m512d top = _mm512_set1_pd(_mm512_reduce_max_ps(most));
  for (int64_t e = 0; e < experts; e += 8) _mm256_storeu_ps(mass + e, powers(_mm256_loadu_ps(x + e), top));
  return false;
}

// Sixteen entries of a row, scaled: infinite where the logit is no number or positive infinity, of which there are none
// where `x` is null.
inline __m512 scaled(const float* x, const float* mass, const float* scale, int64_t e, __mmask16 real) {
  const __m512 product =
      _mm512_mul_ps(_mm512_maskz_loadu_ps(real, mass + e), _mm512_maskz_loadu_ps(real, scale + e));
  if (!x) return product;
  const __mmask16 odd = _mm512_fpclass_ps_mask(_mm512_maskz_loadu_ps(real, x + e), ODD);
  return _mm512_mask_mov_ps(product, odd, _mm512_set1_ps(std::numeric_limits<float>::infinity()));
}

// A group's tokens before they are scaled.
struct Rows {
  const float* x;
  const uint8_t* valid;  // (N), or null
  int64_t n, experts;
  float* mass;  // (N, E)
  mutable std::atomic<bool> odd{false};

  void fill(int64_t t) const {
    float* to = mass + t * experts;
    if (valid && !valid[t])
      std::fill_n(to, experts, 0.0f);
    else if (exponentials(x + t * experts, experts, to))
      odd = true;
  }
};

}  // namespace
