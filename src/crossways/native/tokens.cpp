// Rules that look at one token at a time: its k greatest experts, in few groups or up to a share of its probability.
//
// Legend: T tokens, E experts, K experts per token, G groups of neighbouring experts.
#include <omp.h>

#include "sixteen.h"

namespace {

// A group's score: the sum of its `best` greatest entries. What is not allowed adds nothing, and a group without
// anything allowed comes last.
__m512i group_score(Sixteen& scratch, const __m512i* keys, int64_t size, int64_t best) {
  scratch.rank(keys, size, best);
  __m512 sum = _mm512_setzero_ps();
  for (int64_t j = 0; j < best; j++) {
    const __m512 value = floats_of(scratch.best[j]);
    const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    const __mmask16 adds = scratch.open(j) & _mm512_cmp_ps_mask(value, least, _CMP_NEQ_UQ);
    sum = _mm512_mask_add_ps(sum, adds, sum, value);
  }
  return _mm512_mask_mov_epi32(_mm512_set1_epi32(CLOSED), scratch.open(0), keys_of(sum));
}

// Closes the experts of all but a token's `kept` best groups.
void limit(Sixteen& tokens, Sixteen& scratch, std::vector<__m512i>& scores, int64_t best, int64_t kept) {
  const int64_t groups = scores.size(), size = tokens.experts / groups;
  for (int64_t g = 0; g < groups; g++) scores[g] = group_score(scratch, &tokens.keys[g * size], size, best);
  scratch.rank(scores.data(), groups, kept);
  for (int64_t g = 0; g < groups; g++) {
    __mmask16 within = 0;
    for (int64_t j = 0; j < kept; j++)
      within |= _mm512_cmpeq_epi32_mask(scratch.index[j], _mm512_set1_epi32(int32_t(g)));
    for (int64_t e = g * size; e < (g + 1) * size; e++)
      tokens.keys[e] = _mm512_mask_mov_epi32(_mm512_set1_epi32(CLOSED), within, tokens.keys[e]);
  }
}

// Bits of each token's greatest allowed expert.
void put_greatest(const float* x, const Allowed& may, int64_t tokens, const Bits& bits, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    Sixteen found(may.experts, 1);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; t++)
      found.put_greatest(bits, may, t, [&](int64_t piece, __mmask16 real) {
        const float* here = x + t * may.experts + 16 * piece;
        __builtin_prefetch(here + 16 * may.experts);
        return keys_of(_mm512_maskz_loadu_ps(real, here));
      });
  }
}

}  // namespace

extern "C" {

// index[t] = the k greatest of the token's experts, greatest first, earlier ones of equals first; those that are not
// allowed come last.
void crossways_top_k(const float* x, const uint64_t* allowed, int64_t tokens, int64_t experts, int64_t k,
                     int64_t* index, int64_t threads) {
  for_sixteens(x, Allowed(allowed, experts), tokens, k, threads, [=](Sixteen& found, int64_t first, int64_t count) {
    found.rank(k);
    for (int64_t j = 0; j < k; j++) {
      alignas(64) int32_t who[16];
      _mm512_store_si512(who, found.index[j]);
      for (int64_t i = 0; i < count; i++) index[(first + i) * k + j] = who[i];
    }
  });
}

// Bits of each token's k greatest allowed experts.
void crossways_bits_of_top_k(const float* x, const uint64_t* allowed, int64_t tokens, int64_t experts, int64_t k,
                             uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
  if (k == 1) return put_greatest(x, Allowed(allowed, experts), tokens, bits, threads);
  for_sixteens(x, Allowed(allowed, experts), tokens, k, threads, [=](Sixteen& found, int64_t first, int64_t count) {
    found.rank(k);
    put_open(bits, found, first, count, k);
  });
}

// The same within the token's `kept` best of G groups, which are ranked by the sum of their `best` greatest entries.
void crossways_bits_of_group_limited(const float* x, const uint64_t* allowed, int64_t tokens, int64_t experts,
                                     int64_t k, int64_t groups, int64_t best, int64_t kept, uint64_t* words,
                                     int64_t threads) {
  const Bits bits(words, experts);
  const Sixteen room(0, std::max(best, kept));
  const std::vector<__m512i> score(groups);
  auto each = [=, scratch = room, scores = score](Sixteen& found, int64_t first, int64_t count) mutable {
    limit(found, scratch, scores, best, kept);
    found.rank(k);
    put_open(bits, found, first, count, k);
  };
  for_sixteens(x, Allowed(allowed, experts), tokens, k, threads, each);
}

// Bits of each token's greatest allowed experts, until those before hold `share` of `scores`, k at most. Sums are kept
// in double and compared in float, as PyTorch's cumsum gives them.
void crossways_bits_of_top_p(const float* x, const float* scores, const uint64_t* allowed, int64_t tokens,
                             int64_t experts, int64_t k, float share, uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
  const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(int32_t(experts)));
  for_sixteens(x, Allowed(allowed, experts), tokens, k, threads, [=](Sixteen& found, int64_t first, int64_t count) {
    found.rank(k);
    __m512d low = _mm512_setzero_pd(), high = low;
    for (int64_t j = 0; j < k; j++) {
      const __m512 before = _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
      found.taken[j] = found.open(j) & _mm512_cmp_ps_mask(before, _mm512_set1_ps(share), _CMP_NGE_UQ);
      const __m512i at = _mm512_add_epi32(rows, found.index[j]);
      const __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes(count), at, scores + first * experts, 4);
      low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(value)));
      high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(value, 1)));
    }
    put_taken(bits, first, count, found, k);
  });
}
}
