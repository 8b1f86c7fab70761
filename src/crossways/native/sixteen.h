// Sixteen tokens at a time, one a lane: their greatest experts by insertion, without a branch.
//
// Legend: E experts, K experts per token.
#pragma once
#include <omp.h>

#include <vector>

#include "bits.h"
#include "simd.h"

// What is not allowed comes just above what does not exist, so that it is still somebody's last choice.
constexpr int32_t CLOSED = NOBODY + 1;

struct Sixteen {
  int64_t experts;
  std::vector<__m512i> keys;         // (E in whole sixteens): of each expert, a token a lane
  std::vector<__m512i> best, index;  // the greatest keys in descending order, and whose they are
  std::vector<__mmask16> taken;      // which of these are chosen

  Sixteen(int64_t experts_, int64_t k)
      : experts(experts_), keys((experts_ + 15) / 16 * 16), best(k + 16), index(k + 16), taken(k) {}

  // Tokens from `first` on; there are `count` of them, 16 at most. `key_of(i, piece, real)` gives keys of the i-th.
  template <class KeyOf>
  void load(const Allowed& may, int64_t first, int64_t count, KeyOf key_of) {
    for (int64_t piece = 0; 16 * piece < experts; piece++) {
      const __mmask16 real = may.real(piece);
      __m512i* row = &keys[16 * piece];
      for (int64_t i = 0; i < 16; i++) {
        row[i] = _mm512_set1_epi32(CLOSED);
        if (i >= count) continue;
        row[i] = _mm512_mask_mov_epi32(row[i], may.open(first + i, piece), key_of(i, piece, real));
      }
      crossways::transpose(row);
    }
  }

  void load(const float* x, const Allowed& may, int64_t first, int64_t count) {
    load(may, first, count, [&](int64_t i, int64_t piece, __mmask16 real) {
      const float* here = x + (first + i) * experts + 16 * piece;
      __builtin_prefetch(here + 16 * experts);  // the next sixteen tokens, while these are ranked
      return keys_of(_mm512_maskz_loadu_ps(real, here));
    });
  }

  // The k greatest, of equals the earlier ones first.
  void rank(const __m512i* from, int64_t among, int64_t k) {
    if (k <= 1) return insert<1>(from, among);
    if (k <= 2) return insert<2>(from, among);
    if (k <= 4) return insert<4>(from, among);
    if (k <= 8) return insert<8>(from, among);
    if (k <= 16) return insert<16>(from, among);
    begin(k);
    for (int64_t e = 0; e < among; e++) push(from[e], e, k, best.data(), index.data());
  }

  void rank(int64_t k) { rank(keys.data(), experts, k); }

  // Of one token alone, experts as lanes: marks its greatest that may be chosen, of equals the first. For k = 1 this is
  // less work than turning rows into columns.
  template <class KeyOf>
  void put_greatest(const Bits& bits, const Allowed& may, int64_t token, const KeyOf& key_of) {
    may.words || experts % 16 ? put_greatest<false>(bits, may, token, key_of)
                              : put_greatest<true>(bits, may, token, key_of);
  }

  // With `whole`, all sixteens of experts exist and are allowed.
  template <bool whole, class KeyOf>
  void put_greatest(const Bits& bits, const Allowed& may, int64_t token, const KeyOf& key_of) {
    const __m512i closed = _mm512_set1_epi32(CLOSED);
    __m512i most = closed;
    for (int64_t piece = 0; 16 * piece < experts; piece++) {
      keys[piece] = key_of(piece, whole ? 0xffff : may.real(piece));
      if (!whole) keys[piece] = _mm512_mask_mov_epi32(closed, may.open(token, piece), keys[piece]);
      most = _mm512_max_epi32(most, keys[piece]);
    }
    const int32_t top = _mm512_reduce_max_epi32(most);
    bool done = top == CLOSED;  // nobody may be chosen
    for (int64_t w = 0; w < bits.width; w++) {
      uint64_t equal = 0;
      for (int64_t piece = 4 * w; piece < 4 * w + 4 && 16 * piece < experts; piece++)
        equal |= uint64_t(_mm512_cmpeq_epi32_mask(keys[piece], _mm512_set1_epi32(top))) << 16 * (piece % 4);
      bits.of(token)[w] = done ? 0 : equal & -equal;
      done |= equal != 0;
    }
  }

  // Lanes whose j-th choice may be chosen.
  __mmask16 open(int64_t j) const { return _mm512_cmpgt_epi32_mask(best[j], _mm512_set1_epi32(CLOSED)); }

 private:
  void begin(int64_t k) {
    std::fill_n(best.begin(), k, _mm512_set1_epi32(NOBODY));
    std::fill_n(index.begin(), k, _mm512_setzero_si512());
  }

  // Into lists in descending order, below its equals; what comes last is lost.
  static void push(__m512i key, int64_t e, int64_t k, __m512i* best, __m512i* index) {
    const __m512i who = _mm512_set1_epi32(int32_t(e));
    __mmask16 above = _mm512_cmpgt_epi32_mask(key, best[k - 1]);
#pragma GCC unroll 16
    for (int64_t j = k - 1; j > 0; j--) {
      const __mmask16 further = _mm512_cmpgt_epi32_mask(key, best[j - 1]);
      best[j] = _mm512_mask_mov_epi32(best[j], above, _mm512_mask_mov_epi32(key, further, best[j - 1]));
      index[j] = _mm512_mask_mov_epi32(index[j], above, _mm512_mask_mov_epi32(who, further, index[j - 1]));
      above = further;
    }
    best[0] = _mm512_mask_mov_epi32(best[0], above, key);
    index[0] = _mm512_mask_mov_epi32(index[0], above, who);
  }

  // The same with K known, so that the list stays in registers.
  template <int K>
  void insert(const __m512i* from, int64_t among) {
    __m512i key[K], who[K];
    std::fill_n(key, K, _mm512_set1_epi32(NOBODY));
    std::fill_n(who, K, _mm512_setzero_si512());
    for (int64_t e = 0; e < among; e++) push(from[e], e, K, key, who);
    std::copy_n(key, K, best.begin());
    std::copy_n(who, K, index.begin());
  }
};

// The first `count` tokens' words: who of their k best is taken.
inline void put_taken(const Bits& bits, int64_t first, int64_t count, const Sixteen& from, int64_t k) {
  const __m512i one = _mm512_set1_epi64(1);
  for (int64_t w = 0; w < bits.width; w++) {
    __m512i half[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int64_t j = 0; j < k; j++) {
      const __m512i here = _mm512_sub_epi32(from.index[j], _mm512_set1_epi32(int32_t(64 * w)));
      // A shift by less than 0, which as unsigned is much, or by 64 or more leaves nothing: it is another word's.
      const __m512i low = _mm512_cvtepi32_epi64(_mm512_castsi512_si256(here));
      const __m512i high = _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(here, 1));
      half[0] = _mm512_or_si512(half[0], _mm512_maskz_sllv_epi64(__mmask8(from.taken[j]), one, low));
      half[1] = _mm512_or_si512(half[1], _mm512_maskz_sllv_epi64(__mmask8(from.taken[j] >> 8), one, high));
    }
    alignas(64) uint64_t words[16];
    _mm512_store_si512(words, half[0]);
    _mm512_store_si512(words + 8, half[1]);
    for (int64_t i = 0; i < count; i++) bits.of(first + i)[w] = words[i];
  }
}

inline void put_open(const Bits& bits, Sixteen& found, int64_t first, int64_t count, int64_t k) {
  for (int64_t j = 0; j < k; j++) found.taken[j] = found.open(j);
  put_taken(bits, first, count, found, k);
}

// `each(tokens, first, count)` for every sixteen tokens, with their keys at hand. Every thread has a copy of `each`.
template <class Each>
void for_sixteens(const float* x, const Allowed& may, int64_t tokens, int64_t k, int64_t threads, Each each) {
#pragma omp parallel num_threads(threads) firstprivate(each)
  {
    Sixteen sixteen(may.experts, k);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < (tokens + 15) / 16; block++) {
      const int64_t count = std::min<int64_t>(16, tokens - 16 * block);
      sixteen.load(x, may, 16 * block, count);
      each(sixteen, 16 * block, count);
    }
  }
}
