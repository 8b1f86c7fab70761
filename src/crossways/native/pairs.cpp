// Pairs in the order of their experts, for the CPU: counting sorts, and the weights of pairs out of a matrix and back.
//
// Legend: T tokens, P pairs, E experts, K experts per token.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// The chosen pairs of any representation, by expert and then by token. `each(t, found)` calls found(e) for every
// expert of token t. Each thread has some tokens; it counts, and writes where the counts of all say.
// Returns the number of pairs; `token` and `expert` may be null, to count alone.
template <class Each>
int64_t sort_tokens(int64_t tokens, int64_t experts, int64_t* token, int64_t* expert, int64_t* offsets,
                    int64_t threads, Each each) {
  std::vector<int64_t> next((threads + 1) * experts, 0);
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = tokens * me / team, end = tokens * (me + 1) / team;
    std::vector<int64_t> count(experts, 0);
    for (int64_t t = begin; t < end; t++) each(t, [&](int64_t e) { count[e]++; });
    std::copy(count.begin(), count.end(), next.begin() + me * experts);
#pragma omp barrier
#pragma omp single
    {
      int64_t sum = 0;
      for (int64_t e = 0; e < experts; e++) {
        offsets[e] = sum;
        for (int64_t one = 0; one < team; one++) {
          const int64_t here = next[one * experts + e];
          next[one * experts + e] = sum;
          sum += here;
        }
      }
      offsets[experts] = sum;
    }
    if (token) {
      std::copy_n(next.begin() + me * experts, experts, count.begin());
      for (int64_t t = begin; t < end; t++) each(t, [&](int64_t e) { token[count[e]++] = t; });
#pragma omp for
      for (int64_t e = 0; e < experts; e++) std::fill(expert + offsets[e], expert + offsets[e + 1], e);
    }
  }
  return offsets[experts];
}

}  // namespace

extern "C" {

// Pairs of a (T, E) mask; with `token` null, offsets alone.
int64_t crossways_mask_pairs(const uint8_t* mask, int64_t tokens, int64_t experts, int64_t* token, int64_t* expert,
                             int64_t* offsets, int64_t threads) {
  return sort_tokens(tokens, experts, token, expert, offsets, threads, [&](int64_t t, auto found) {
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
int64_t crossways_index_pairs(const int64_t* index, const uint8_t* kept, const uint8_t* allowed, int64_t tokens,
                              int64_t k, int64_t experts, int64_t* token, int64_t* expert, int64_t* offsets,
                              int64_t threads) {
  return sort_tokens(tokens, experts, token, expert, offsets, threads, [&](int64_t t, auto found) {
    for (int64_t j = 0; j < k; j++) {
      const int64_t e = index[t * k + j];
      if ((!kept || kept[t * k + j]) && (!allowed || allowed[t * experts + e])) found(e);
    }
  });
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
