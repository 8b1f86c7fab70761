// Pairs in the order of their experts, for the CPU: counting sorts, and the weights of pairs out of a matrix and back.
//
// Legend: T tokens, P pairs, E experts, K experts per token.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

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

// `each(t, found)` calls found(e) for every expert of token t.
template <class Each>
void write_pairs(int64_t tokens, int64_t experts, int64_t* next, int64_t parts, const int64_t* offsets, int64_t* token,
                 int64_t* expert, Each each) {
#pragma omp parallel num_threads(parts)
  {
#pragma omp for
    for (int64_t part = 0; part < parts; part++) {
      int64_t* to = next + part * experts;
      for (int64_t t = tokens * part / parts; t < tokens * (part + 1) / parts; t++)
        each(t, [&](int64_t e) { token[to[e]++] = t; });
    }
#pragma omp for
    for (int64_t e = 0; e < experts; e++) std::fill(expert + offsets[e], expert + offsets[e + 1], e);
  }
}

}  // namespace

extern "C" {

// First half of the pairs of a (T, E) mask: offsets[e], where each expert's begin, and next (parts, E), for the second.
void crossways_mask_offsets(const uint8_t* mask, int64_t tokens, int64_t experts, int64_t* offsets, int64_t* next,
                            int64_t parts) {
#pragma omp parallel for num_threads(parts)
  for (int64_t part = 0; part < parts; part++) {
    int64_t* count = next + part * experts;
    std::vector<uint8_t> few(experts, 0);  // of so many rows that a byte holds it
    std::fill_n(count, experts, 0);
    int64_t t = tokens * part / parts;
    for (const int64_t end = tokens * (part + 1) / parts; t < end;) {
      for (const int64_t stop = std::min<int64_t>(t + 255, end); t < stop; t++)
        for (int64_t e = 0; e < experts; e++) few[e] += mask[t * experts + e];
      for (int64_t e = 0; e < experts; e++) count[e] += few[e], few[e] = 0;
    }
  }
  begin_of_parts(next, parts, experts, offsets);
}

// Second half: tokens and experts of the pairs, by expert and then by token.
void crossways_mask_pairs(const uint8_t* mask, int64_t tokens, int64_t experts, const int64_t* offsets, int64_t* next,
                          int64_t parts, int64_t* token, int64_t* expert) {
  write_pairs(tokens, experts, next, parts, offsets, token, expert, [=](int64_t t, auto found) {
    const uint8_t* row = mask + t * experts;
    int64_t e = 0;
    for (; e + 8 <= experts; e += 8) {
      uint64_t eight;
      std::memcpy(&eight, row + e, 8);
      for (; eight; eight &= eight - 1) found(e + __builtin_ctzll(eight) / 8);
    }
    for (; e < experts; e++)
      if (row[e]) found(e);
  });
}

// Pairs of each token's K experts, but for those that are not kept (T, K) or not allowed (T, E), which may be null.
void crossways_index_pairs(const int64_t* index, const uint8_t* kept, const uint8_t* allowed, int64_t tokens,
                           int64_t k, int64_t experts, int64_t* token, int64_t* expert, int64_t* offsets,
                           int64_t parts) {
  auto each = [=](int64_t t, auto found) {
    for (int64_t j = 0; j < k; j++) {
      const int64_t e = index[t * k + j];
      if ((!kept || kept[t * k + j]) && (!allowed || allowed[t * experts + e])) found(e);
    }
  };
  std::vector<int64_t> next(parts * experts, 0);
#pragma omp parallel for num_threads(parts)
  for (int64_t part = 0; part < parts; part++) {
    std::vector<int64_t> count(experts, 0);
    for (int64_t t = tokens * part / parts; t < tokens * (part + 1) / parts; t++) each(t, [&](int64_t e) { count[e]++; });
    std::copy(count.begin(), count.end(), next.begin() + part * experts);
  }
  begin_of_parts(next.data(), parts, experts, offsets);
  write_pairs(tokens, experts, next.data(), parts, offsets, token, expert, each);
}

// A stable counting sort of pairs by expert. order[i] = which pair comes i-th; offsets[e] = first pair of expert e.
// Returns 0 if an expert lies outside [0, experts).
int crossways_sort_pairs(const int64_t* expert, int64_t pairs, int64_t experts, int64_t* order, int64_t* sorted,
                         int64_t* offsets) {
  std::fill_n(offsets, experts + 1, 0);
  for (int64_t i = 0; i < pairs; i++) {
    if (expert[i] < 0 || expert[i] >= experts) return 0;
    offsets[expert[i] + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  std::vector<int64_t> next(offsets, offsets + experts);
  for (int64_t i = 0; i < pairs; i++) {
    const int64_t at = next[expert[i]]++;
    order[at] = i;
    sorted[at] = expert[i];
  }
  return 1;
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
