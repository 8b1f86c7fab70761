// Floats in order: integers that compare as floats should, and where the greatest of many end.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

// No float has this key: it is for entries that take no part.
constexpr int32_t NOBODY = INT32_MIN;

// Integers in the order of the floats; every NaN is greatest, and the two zeros are one.
inline int32_t key_of(float x) {
  int32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, 4);
  return x != x ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

inline float float_of(int32_t key) {
  if (key == INT32_MAX) return std::numeric_limits<float>::quiet_NaN();
  const int32_t bits = key ^ ((key >> 31) & INT32_MAX);
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Sixteen of them.
inline __m512i keys_of(__m512 x) {
  x = _mm512_add_ps(x, _mm512_setzero_ps());
  const __m512i bits = _mm512_castps_si512(x), most = _mm512_set1_epi32(INT32_MAX);
  const __m512i key = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), most));
  return _mm512_mask_mov_epi32(key, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), most);
}

inline __m512 floats_of(__m512i key) {
  const __m512i most = _mm512_set1_epi32(INT32_MAX);
  const __m512i bits = _mm512_xor_si512(key, _mm512_and_si512(_mm512_srai_epi32(key, 31), most));
  const __m512i nan = _mm512_set1_epi32(0x7fc00000);
  return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, _mm512_cmpeq_epi32_mask(key, most), nan));
}

// Those that lie within `real`, of which only the `open` take part.
inline __m512i keys_of(const float* x, __mmask16 real, __mmask16 open) {
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(NOBODY), open, keys_of(_mm512_maskz_loadu_ps(real, x)));
}

inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : left <= 0 ? 0 : __mmask16((1u << left) - 1); }

// Where the greatest end: everything above `key` belongs to them, and the first `ties` of its equals.
struct Cut {
  int32_t key;
  int64_t ties;
};

constexpr Cut NOTHING{INT32_MAX, 0}, EVERYTHING{NOBODY, 0};

// Halfway between two keys, rounded down.
inline int32_t between(int32_t low, int32_t high) { return (low & high) + ((low ^ high) >> 1); }
