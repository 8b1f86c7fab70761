// Floats in order: integers that compare as floats should, and the count-th greatest of many in linear time.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

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

// Sixteen of them; lanes outside `real` are NOBODY, and those outside `allowed` come just above it.
inline __m512i keys_of(const float* x, __mmask16 real, __mmask16 allowed) {
  const __m512 value = _mm512_add_ps(_mm512_maskz_loadu_ps(real, x), _mm512_setzero_ps());
  const __m512i bits = _mm512_castps_si512(value), most = _mm512_set1_epi32(INT32_MAX);
  __m512i key = _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), most));
  key = _mm512_mask_mov_epi32(key, _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), most);
  key = _mm512_mask_mov_epi32(_mm512_set1_epi32(NOBODY + 1), allowed, key);
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(NOBODY), real, key);
}

// Where the greatest end: everything above `key` belongs to them, and the first `ties` of its equals.
struct Cut {
  int32_t key;
  int64_t ties;
};

constexpr Cut NOTHING{INT32_MAX, 0}, EVERYTHING{NOBODY, INT64_MAX};

inline bool takes(Cut& cut, int32_t key) {
  const bool tie = key == cut.key && cut.ties > 0;
  cut.ties -= tie;
  return (key > cut.key || tie) && key != NOBODY;
}

inline int bin_of(int32_t key, int bits) { return (key >> (32 - bits)) + (1 << bits >> 1); }

// The cut among the keys of one bin, of which the `count` greatest belong. Reorders them.
inline Cut cut_of_few(std::vector<int32_t>& few, int64_t count) {
  std::nth_element(few.begin(), few.begin() + count - 1, few.end(), std::greater<int32_t>());
  const int32_t key = few[count - 1];
  for (int32_t one : few) count -= one > key;
  return {key, count};
}

struct Scratch {
  std::vector<int32_t> bins, few;
};

// The cut of the `count` greatest of n keys, none of them NOBODY. One histogram of the high bits finds the bin it lies
// in; the keys of that bin are few.
inline Cut cut_of(const int32_t* keys, int64_t n, int64_t count, Scratch& scratch) {
  if (count <= 0) return NOTHING;
  if (count >= n) return EVERYTHING;
  const int bits = n < (1 << 15) ? 11 : 16;
  scratch.bins.assign(1 << bits, 0);
  for (int64_t i = 0; i < n; i++) scratch.bins[bin_of(keys[i], bits)]++;
  int bin = (1 << bits) - 1;
  for (; scratch.bins[bin] < count; bin--) count -= scratch.bins[bin];
  scratch.few.clear();
  for (int64_t i = 0; i < n; i++)
    if (bin_of(keys[i], bits) == bin) scratch.few.push_back(keys[i]);
  return cut_of_few(scratch.few, count);
}

// The least key that a cut of these takes, NaN's if there is none.
inline float least_of(const Cut& cut, const int32_t* keys, int64_t n) {
  if (cut.key != NOBODY) return cut.ties ? float_of(cut.key) : std::numeric_limits<float>::quiet_NaN();
  return n ? float_of(*std::min_element(keys, keys + n)) : std::numeric_limits<float>::quiet_NaN();
}
