// Chosen pairs as bits: from masks, indices and cutoffs, and to a mask.
//
// Legend: T tokens, E experts, K experts per token.
#include "bits.h"

#include <omp.h>

extern "C" {

// Of a mask (T, E).
void crossways_bits_of_mask(const uint8_t* mask, int64_t tokens, int64_t experts, uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t w = 0; w < bits.width; w++) {
      const int64_t left = experts - 64 * w;
      const __mmask64 real = left >= 64 ? ~uint64_t(0) : (uint64_t(1) << left) - 1;
      const __m512i row = _mm512_maskz_loadu_epi8(real, mask + t * experts + 64 * w);
      bits.of(t)[w] = _mm512_test_epi8_mask(row, row);
    }
}

void crossways_mask_of_bits(const uint64_t* words, int64_t tokens, int64_t experts, uint8_t* mask, int64_t threads) {
  const Allowed bits(words, experts);
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t piece = 0; 16 * piece < experts; piece++)
      _mm_mask_storeu_epi8(mask + t * experts + 16 * piece, bits.real(piece),
                           _mm_maskz_set1_epi8(bits.open(t, piece), 1));
}

// Of each token's experts (T, K), but for those that are not kept (T, K), which may be null, or not allowed.
void crossways_bits_of_index(const int64_t* index, const uint8_t* kept, const uint64_t* allowed, int64_t tokens,
                             int64_t k, int64_t experts, uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
  const Allowed may(allowed, experts);
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++) {
    std::fill_n(bits.of(t), bits.width, 0);
    for (int64_t i = t * k; i < (t + 1) * k; i++)
      if ((!kept || kept[i]) && may.has(t, index[i])) bits.add(t, index[i]);
  }
}

// Of the pairs that do not lie below their cutoff, or, with `above`, are not at it either. There is one cutoff for all,
// or with `step` 1 one for each expert. A NaN is neither below nor at anything.
void crossways_bits_of_cutoff(const float* x, const uint64_t* allowed, const float* cutoff, int64_t step, int64_t above,
                              int64_t tokens, int64_t experts, uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
  const Allowed may(allowed, experts);
#pragma omp parallel for num_threads(threads)
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t piece = 0; piece < bits.pieces(); piece++) {
      const __mmask16 real = bits.real(piece);
      const __m512 row = _mm512_maskz_loadu_ps(real, x + t * experts + 16 * piece);
      const __m512 least = step ? _mm512_maskz_loadu_ps(real, cutoff + 16 * piece) : _mm512_set1_ps(*cutoff);
      bits.put(t, piece, may.open(t, piece) & (above ? _mm512_cmp_ps_mask(row, least, _CMP_NLE_UQ)
                                                     : _mm512_cmp_ps_mask(row, least, _CMP_NLT_UQ)));
    }
}
}
