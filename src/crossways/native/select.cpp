// Routing for the CPU: which entries are greatest, and pairs in the order of their experts. All in linear time.
//
// Legend: T tokens, P pairs, E experts, K experts per token, G rows of N entries.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Integers in the order of the floats; every NaN is greatest, and the two zeros are one.
inline int32_t key_of(float x) {
  int32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, 4);
  return x != x ? INT32_MAX : bits ^ ((bits >> 31) & INT32_MAX);
}

constexpr int64_t MANY = 1 << 15;  // entries for which a histogram of 2^16 bins pays; else of 2^11

// The `count` greatest of n keys, 0 < count < n: the least of them, and how many of its equals belong to them.
// One histogram of the high halves finds the bin it lies in; the keys of that bin are few enough to partition.
struct Cut {
  int32_t key;
  int64_t ties;
};
Cut cut_of(const std::vector<int32_t>& keys, int64_t count, std::vector<int64_t>& bins, std::vector<int32_t>& few) {
  const int bits = int64_t(keys.size()) < MANY ? 11 : 16, size = 1 << bits;
  auto bin_of = [&](int32_t key) { return (key >> (32 - bits)) + size / 2; };
  bins.assign(size, 0);
  for (int32_t key : keys) bins[bin_of(key)]++;
  int bin = size - 1;
  for (; bins[bin] < count; bin--) count -= bins[bin];
  few.clear();
  for (int32_t key : keys)
    if (bin_of(key) == bin) few.push_back(key);
  std::nth_element(few.begin(), few.begin() + count - 1, few.end(), std::greater<int32_t>());
  const int32_t key = few[count - 1];
  for (int32_t one : few) count -= one > key;
  return {key, count};
}

}  // namespace

extern "C" {

// mask[g] = the budget[g] greatest allowed entries of row g (all allowed ones if there are fewer), earlier ones of
// equals first; least[g] = the least of them, unless null. `allowed` may be null.
void crossways_top_of_rows(const float* x, const uint8_t* allowed, const int64_t* budget, int64_t rows, int64_t n,
                           uint8_t* mask, float* least, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> bins;
    std::vector<int32_t> keys, few;
#pragma omp for schedule(dynamic)
    for (int64_t g = 0; g < rows; g++) {
      const float* from = x + g * n;
      const uint8_t* may = allowed ? allowed + g * n : nullptr;
      uint8_t* to = mask + g * n;
      keys.resize(n);
      int64_t count = 0;
      for (int64_t i = 0; i < n; i++) {
        keys[count] = key_of(from[i]);
        count += !may || may[i];
      }
      keys.resize(count);
      Cut cut{INT32_MIN, n};
      if (budget[g] <= 0) {
        std::memset(to, 0, n);
        continue;
      }
      if (budget[g] < int64_t(keys.size())) cut = cut_of(keys, budget[g], bins, few);
      for (int64_t i = 0; i < n; i++) {
        const int32_t key = key_of(from[i]);
        const bool take = (!may || may[i]) && (key > cut.key || (key == cut.key && cut.ties > 0));
        cut.ties -= take && key == cut.key;
        to[i] = take;
        if (least && take && key == cut.key) least[g] = from[i];
      }
      if (least && budget[g] >= int64_t(keys.size()) && !keys.empty()) {
        int64_t at = std::min_element(keys.begin(), keys.end()) - keys.begin();
        for (int64_t i = 0; i < n; i++)
          if ((!may || may[i]) && at-- == 0) least[g] = from[i];
      }
    }
  }
}

// index[t] = the k greatest of the row's n entries, greatest first, earlier ones of equals first.
void crossways_top_k(const float* x, int64_t rows, int64_t n, int64_t k, int64_t* index, int64_t threads) {
  const int64_t lanes = (n + 15) / 16 * 16;
#pragma omp parallel num_threads(threads)
  {
    // One block of 16 entries after another, with the greatest of each block at hand.
    std::vector<int32_t> keys(lanes), best(lanes / 16);
#pragma omp for
    for (int64_t t = 0; t < rows; t++) {
      for (int64_t i = 0; i < n; i++) keys[i] = key_of(x[t * n + i]);
      // Below every key but that of a negative NaN's bits, which key_of never makes.
      for (int64_t i = n; i < lanes; i++) keys[i] = INT32_MIN;
      auto block_best = [&](int64_t b) {
        int32_t top = INT32_MIN;
        for (int i = 0; i < 16; i++) top = std::max(top, keys[b * 16 + i]);
        best[b] = top;
      };
      for (int64_t b = 0; b < lanes / 16; b++) block_best(b);
      for (int64_t j = 0; j < k; j++) {
        int64_t b = std::max_element(best.begin(), best.end()) - best.begin();
        int32_t found = best[b];
        int at = 0;
        while (keys[b * 16 + at] != found) at++;
        index[t * k + j] = b * 16 + at;
        keys[b * 16 + at] = INT32_MIN;
        block_best(b);
      }
    }
  }
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

// Where each expert's pairs begin in a (T, E) mask of chosen pairs; offsets[E] is their number.
void crossways_mask_offsets(const uint8_t* mask, int64_t tokens, int64_t experts, int64_t* offsets) {
  std::vector<int32_t> count(experts);
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t e = 0; e < experts; e++) count[e] += mask[t * experts + e];
  offsets[0] = 0;
  for (int64_t e = 0; e < experts; e++) offsets[e + 1] = offsets[e] + count[e];
}

// Tokens and experts of the chosen pairs, by expert and then by token.
void crossways_mask_pairs(const uint8_t* mask, int64_t tokens, int64_t experts, const int64_t* offsets, int64_t* token,
                          int64_t* expert) {
  std::vector<int64_t> next(offsets, offsets + experts);
  for (int64_t t = 0; t < tokens; t++) {
    const uint8_t* row = mask + t * experts;
    int64_t e = 0;
    for (; e + 8 <= experts; e += 8) {
      uint64_t eight;
      std::memcpy(&eight, row + e, 8);
      for (; eight; eight &= eight - 1) {
        const int64_t one = e + __builtin_ctzll(eight) / 8;
        token[next[one]++] = t;
      }
    }
    for (; e < experts; e++)
      if (row[e]) token[next[e]++] = t;
  }
  for (int64_t e = 0; e < experts; e++) std::fill(expert + offsets[e], expert + offsets[e + 1], e);
}
}
