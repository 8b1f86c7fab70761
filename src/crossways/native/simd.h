// Vectors of 16 floats, and the rearrangements that stand between rows of tokens and the operands of a product.
//
// A *word* is 32 bits: one float, or two neighbouring bfloat16 along the summed dimension, which is how the matrix
// unit wants its right operand.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace crossways {

using Vec = __m512;
using Words = __m512i;
struct bf16 {
  uint16_t bits;
};

inline __mmask16 first16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
inline __mmask32 first32(int64_t n) {
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : static_cast<__mmask32>((1u << n) - 1);
}

inline Vec widen(__m256i half) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Round to nearest even; a NaN stays one.
inline Words round_words(Vec x) {
  Words bits = _mm512_castps_si512(x);
  Words odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  Words rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_mask_set1_epi32(rounded, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), 0x7fc0);
}

#ifdef __AVX512BF16__
inline __m256i narrow(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }
// Words whose low halves are `low` and whose high halves are `high`.
inline Words pair_words(Vec low, Vec high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(narrow(low)),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow(high)), 16));
}
#else
inline __m256i narrow(Vec x) { return _mm512_cvtepi32_epi16(round_words(x)); }
inline Words pair_words(Vec low, Vec high) {
  return _mm512_or_si512(round_words(low), _mm512_slli_epi32(round_words(high), 16));
}
#endif

inline Vec load(const float* from, __mmask16 mask = 0xffff) { return _mm512_maskz_loadu_ps(mask, from); }
inline Vec load(const bf16* from, __mmask16 mask = 0xffff) { return widen(_mm256_maskz_loadu_epi16(mask, from)); }
inline void store(float* to, Vec x, __mmask16 mask = 0xffff) { _mm512_mask_storeu_ps(to, mask, x); }
inline void store(bf16* to, Vec x, __mmask16 mask = 0xffff) { _mm256_mask_storeu_epi16(to, mask, narrow(x)); }

// 16 x 16 words, rows to columns, in place.
inline void transpose(Words r[16]) {
  Words t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
  }
}

// e^x to about one unit in the last place: 2^n p(r), |r| <= ln 2 / 2 (Cody and Waite's reduction, degree 6).
inline Vec exp(Vec x) {
  const Vec top = _mm512_set1_ps(88.3762626647950f), bottom = _mm512_set1_ps(-87.3365447504019f);
  // min and max return their second operand for a NaN, so it stays one.
  x = _mm512_max_ps(bottom, _mm512_min_ps(top, x));
  Vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896f)), 8);
  Vec r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  Vec p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(p, n);
}

// 1 / x for finite x >= 1: an estimate and one step of Newton's method, twice as fast as a division.
inline Vec reciprocal(Vec x) {
  Vec y = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(y, _mm512_fnmadd_ps(x, y, _mm512_set1_ps(2.0f)));
}

// erf(x) with an absolute error below 1.5e-7 (Abramowitz and Stegun, 7.1.26).
inline Vec erf(Vec x) {
  Vec size = _mm512_abs_ps(x), one = _mm512_set1_ps(1.0f);
  Vec t = _mm512_div_ps(one, _mm512_fmadd_ps(size, _mm512_set1_ps(0.3275911f), one));
  Vec p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  Vec y = _mm512_fnmadd_ps(_mm512_mul_ps(p, t), exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(x, x))), one);
  Words sign = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x80000000));
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(y), sign));
}

}  // namespace crossways
