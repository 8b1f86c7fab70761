// Pairs in the order of their experts, for the CPU: counting sorts, and the weights of pairs out of a matrix and back.
//
// Legend: T tokens, P pairs, E experts, N parts of the tokens, one for each thread.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bits.h"

namespace {

// Where each part of the tokens begins to write each expert's pairs: next[part, e], from counts in the same place.
void begin_of_parts(int64_t* next, int64_t parts, int64_t experts, int64_t* offsets) {
  int64_t sum = 0;
  for (int64_t e = 0; e < experts; e++) {
    offsets[e] = sum;
    for (int64_t part = 0; part < parts; part++) {
      const int64_t here = next[part * experts + e];
      next[part * experts + e] = sum;
      sum += here;
    }
  }
  offsets[experts] = sum;
}

// count[e] = in how many tokens from `begin` on bit e of one of their words is set.
void count_word(const Allowed& bits, int64_t word, int64_t begin, int64_t end, int64_t* count) {
  alignas(64) uint8_t few[64];
  for (int64_t t = begin; t < end;) {
    __m512i sums = _mm512_setzero_si512();
    for (const int64_t stop = std::min<int64_t>(t + 255, end); t < stop; t++)  // as many as a byte can count
      sums = _mm512_mask_sub_epi8(sums, bits.of(t)[word], sums, _mm512_set1_epi8(-1));
    _mm512_store_si512(few, sums);
    for (int64_t e = 0; e < std::min<int64_t>(64, bits.experts - 64 * word); e++) count[e] += few[e];
  }
}

// The same of one part, for every word.
void count_part(const Allowed& bits, int64_t begin, int64_t end, int64_t* count) {
  std::fill_n(count, bits.experts, 0);
  for (int64_t w = 0; w < bits.width; w++) count_word(bits, w, begin, end, count + 64 * w);
}

// Asks for what a token's pairs weigh. Where rules choose by something else nothing of it was read yet, and one row
// after the other would wait.
void expect(const Allowed& bits, const float* matrix, int64_t t) {
  for (int64_t w = 0; w < bits.width; w++) {
    const float* row = matrix + t * bits.experts + 64 * w;
    for (uint64_t left = bits.of(t)[w]; left;) {
      const int line = __builtin_ctzll(left) & ~15;
      __builtin_prefetch(row + line);
      left &= ~(uint64_t(0xffff) << line);
    }
  }
}

// Tokens of the pairs of a part, and their weights where there is a matrix of these. Every expert's pairs are written
// in a place of their own, more places than the processor foresees by itself: after experts nothing of them is cached.
template <bool weigh>
void write_part(const Allowed& bits, int64_t begin, int64_t end, int64_t* to, const float* matrix, int64_t* token,
                float* weight) {
  constexpr int64_t AHEAD = 16;  // tokens
  for (int64_t t = begin; weigh && t < std::min(begin + AHEAD, end); t++) expect(bits, matrix, t);
  for (int64_t t = begin; t < end; t++) {
    if (weigh && t + AHEAD < end) expect(bits, matrix, t + AHEAD);
    for (int64_t w = 0; w < bits.width; w++)
      for (uint64_t left = bits.of(t)[w]; left; left &= left - 1) {
        const int64_t e = 64 * w + __builtin_ctzll(left), at = to[e]++;
        __builtin_prefetch(token + at + 16, 1);
        if (weigh) __builtin_prefetch(weight + at + 32, 1);
        token[at] = t;
        if (weigh) weight[at] = matrix[t * bits.experts + e];
      }
  }
}

// Rows of a matrix: zero but for a part's pairs, whose values lie as `write_part` writes them.
void spread_part(const Allowed& bits, int64_t begin, int64_t end, int64_t* from, const float* value, float* matrix) {
  for (int64_t t = begin; t < end; t++) {
    float* row = matrix + t * bits.experts;
    std::memset(row, 0, 4 * bits.experts);
    for (int64_t w = 0; w < bits.width; w++)
      for (uint64_t left = bits.of(t)[w]; left; left &= left - 1) {
        const int64_t e = 64 * w + __builtin_ctzll(left), at = from[e]++;
        __builtin_prefetch(value + at + 32);
        row[e] = value[at];
      }
  }
}

// A stable counting sort by expert; put(i, at) is told that pair i comes in place `at`. Experts from `experts` on are
// left out, or with `strict` refused. Returns how many pairs there are, or -1 if an expert is refused or negative.
template <class Put>
int64_t sort(const int64_t* expert, int64_t pairs, int64_t experts, bool strict, int64_t* sorted, int64_t* offsets,
             Put&& put) {
  std::fill_n(offsets, experts + 1, 0);
  for (int64_t i = 0; i < pairs; i++) {
    if (expert[i] < 0 || (strict && expert[i] >= experts)) return -1;
    if (expert[i] < experts) offsets[expert[i] + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  std::vector<int64_t> next(offsets, offsets + experts);
  for (int64_t i = 0; i < pairs; i++) {
    if (expert[i] >= experts) continue;
    const int64_t at = next[expert[i]]++;
    sorted[at] = expert[i];
    put(i, at);
  }
  return offsets[experts];
}

}  // namespace

extern "C" {

// How many pairs there are.
int64_t crossways_count_of_bits(const uint64_t* words, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; i++) sum += __builtin_popcountll(words[i]);
  return sum;
}

// Tokens and experts of the pairs, by expert and then by token, their entries of a matrix (T, E), which may be null,
// and where each expert's begin. Returns how many there are; if there is no `room` for them, none are written.
int64_t crossways_pairs(const uint64_t* words, const float* matrix, int64_t tokens, int64_t experts, int64_t room,
                        int64_t* token, int64_t* expert, float* weight, int64_t* offsets, int64_t parts) {
  const Allowed bits(words, experts);
  std::vector<int64_t> next(parts * experts);
#pragma omp parallel num_threads(parts)
  {
#pragma omp for
    for (int64_t part = 0; part < parts; part++)
      count_part(bits, tokens * part / parts, tokens * (part + 1) / parts, &next[part * experts]);
#pragma omp single
    begin_of_parts(next.data(), parts, experts, offsets);
    if (offsets[experts] <= room) {
#pragma omp for nowait
      for (int64_t part = 0; part < parts; part++)
        (matrix ? write_part<true> : write_part<false>)(bits, tokens * part / parts, tokens * (part + 1) / parts,
                                                        &next[part * experts], matrix, token, weight);
#pragma omp for
      for (int64_t e = 0; e < experts; e++) std::fill(expert + offsets[e], expert + offsets[e + 1], e);
    }
  }
  return offsets[experts];
}

// The other way round: matrix (T, E) = 0 but for these pairs, whose values lie in that order. Row by row, so that each
// is in the cache while its pairs are written.
void crossways_spread(const uint64_t* words, const float* value, int64_t tokens, int64_t experts, float* matrix,
                      int64_t parts) {
  const Allowed bits(words, experts);
  std::vector<int64_t> next(parts * experts), offsets(experts + 1);
#pragma omp parallel num_threads(parts)
  {
#pragma omp for
    for (int64_t part = 0; part < parts; part++)
      count_part(bits, tokens * part / parts, tokens * (part + 1) / parts, &next[part * experts]);
#pragma omp single
    begin_of_parts(next.data(), parts, experts, offsets.data());
#pragma omp for
    for (int64_t part = 0; part < parts; part++)
      spread_part(bits, tokens * part / parts, tokens * (part + 1) / parts, &next[part * experts], value, matrix);
  }
}

// A stable counting sort of pairs by expert. order[i] = which pair comes i-th; offsets[e] = first pair of expert e.
// Returns 0 if an expert lies outside [0, experts).
int crossways_sort_pairs(const int64_t* expert, int64_t pairs, int64_t experts, int64_t* order, int64_t* sorted,
                         int64_t* offsets) {
  return sort(expert, pairs, experts, true, sorted, offsets, [&](int64_t i, int64_t at) { order[at] = i; }) >= 0;
}

// The same of what tokens chose, index (T, K): the pairs' tokens, experts, and as `moved` their weights, of 2 or 4 bytes
// each. With weight null, int64_t moved[i] = which place of `index` comes i-th. Unless `strict`, an index from `experts`
// on means that a place is empty. Returns how many pairs there are, or -1 for an expert that cannot be.
int64_t crossways_sort_choices(const int64_t* index, const void* weight, int64_t tokens, int64_t k, int64_t experts,
                               int64_t strict, int64_t bytes, int64_t* token, int64_t* expert, void* moved,
                               int64_t* offsets) {
  const auto* two = static_cast<const uint16_t*>(weight);
  const auto* four = static_cast<const uint32_t*>(weight);
  int64_t t = 0, end = k;  // instead of divisions
  return sort(index, tokens * k, experts, strict, expert, offsets, [&](int64_t i, int64_t at) {
    while (i >= end) t++, end += k;
    token[at] = t;
    if (!weight)
      static_cast<int64_t*>(moved)[at] = i;
    else if (bytes == 2)
      static_cast<uint16_t*>(moved)[at] = two[i];
    else
      static_cast<uint32_t*>(moved)[at] = four[i];
  });
}

// out[p] = matrix[token[p], expert[p]].
void crossways_take(const float* matrix, const int64_t* token, const int64_t* expert, int64_t pairs, int64_t experts,
                    float* out, int64_t threads) {
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < pairs; p++) out[p] = matrix[token[p] * experts + expert[p]];
}

// matrix = 0 but for matrix[token[p], expert[p]] = value[p]; no two pairs are the same.
void crossways_put(const float* value, const int64_t* token, const int64_t* expert, int64_t pairs, int64_t tokens,
                   int64_t experts, float* matrix, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
#pragma omp for
    for (int64_t t = 0; t < tokens; t++) std::memset(matrix + t * experts, 0, 4 * experts);
#pragma omp for
    for (int64_t p = 0; p < pairs; p++) matrix[token[p] * experts + expert[p]] = value[p];
  }
}
}
