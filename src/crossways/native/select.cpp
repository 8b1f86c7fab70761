// Selection for the CPU: which entries of rows, of columns, or of each token are greatest. All in linear time.
//
// Legend: T tokens, E experts, K experts per token, G groups (or rows) of N entries.
#include <omp.h>

#include "rank.h"

namespace {

// The keys of n entries that are allowed, one after the other; how many there are.
int64_t keys_of_row(const float* x, const uint8_t* may, int64_t n, int32_t* keys) {
  int64_t count = 0;
  if (!may) {
    for (; count < n; count++) keys[count] = key_of(x[count]);
    return n;
  }
  for (int64_t i = 0; i < n; i++) {
    keys[count] = key_of(x[i]);
    count += may[i] != 0;
  }
  return count;
}

inline __mmask16 open_lanes(__mmask16 real, const uint8_t* may) {
  return may ? _mm_mask_test_epi8_mask(real, _mm_maskz_loadu_epi8(real, may), _mm_set1_epi8(-1)) : real;
}

inline __mmask16 lanes(int64_t left) { return left >= 16 ? 0xffff : __mmask16((1u << left) - 1); }

void mark(const float* x, const uint8_t* may, int64_t n, Cut cut, uint8_t* mask) {
  const __m512i least = _mm512_set1_epi32(cut.key);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 real = lanes(n - i), open = open_lanes(real, may ? may + i : nullptr);
    const __m512i keys = keys_of(x + i, real, real);
    __mmask16 taken = _mm512_mask_cmpgt_epi32_mask(open, keys, least);
    for (__mmask16 ties = _mm512_mask_cmpeq_epi32_mask(open, keys, least); ties && cut.ties > 0; ties &= ties - 1) {
      taken |= ties & -ties;
      cut.ties--;
    }
    _mm_mask_storeu_epi8(mask + i, real, _mm_maskz_set1_epi8(taken, 1));
  }
}

// One row by all threads: each has a part of it, from keys to mask.
void top_of_long_row(const float* x, const uint8_t* may, int64_t budget, int64_t n, uint8_t* mask, float* least,
                     int64_t threads) {
  constexpr int BITS = 16;
  std::vector<int32_t> keys(n);
  std::vector<Scratch> parts(threads);
  std::vector<int64_t> counts(threads), equal(threads);
  Cut cut = NOTHING;
  int64_t total = 0, left = budget;
  int bin = (1 << BITS) - 1;
#pragma omp parallel num_threads(threads)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = n * me / team, size = n * (me + 1) / team - begin;
    Scratch& mine = parts[me];
    int32_t* key = keys.data() + begin;
    counts[me] = keys_of_row(x + begin, may ? may + begin : nullptr, size, key);
    mine.bins.assign(1 << BITS, 0);
    for (int64_t i = 0; i < counts[me]; i++) mine.bins[bin_of(key[i], BITS)]++;
#pragma omp barrier
#pragma omp single
    {
      for (int64_t one = 0; one < team; one++) total += counts[one];
      if (budget > 0 && budget < total)
        for (;; bin--) {
          int64_t here = 0;
          for (int64_t one = 0; one < team; one++) here += parts[one].bins[bin];
          if (here >= left) break;
          left -= here;
        }
    }
    const bool searching = budget > 0 && budget < total;
    if (searching)
      for (int64_t i = 0; i < counts[me]; i++)
        if (bin_of(key[i], BITS) == bin) mine.few.push_back(key[i]);
#pragma omp barrier
#pragma omp single
    if (searching) {
      std::vector<int32_t> few;
      for (int64_t one = 0; one < team; one++) few.insert(few.end(), parts[one].few.begin(), parts[one].few.end());
      cut = cut_of_few(few, left);
    } else if (budget > 0) {
      cut = EVERYTHING;
    }
    equal[me] = std::count(mine.few.begin(), mine.few.end(), cut.key);
#pragma omp barrier
    Cut own = cut;
    for (int64_t one = 0; one < me; one++) own.ties = std::max<int64_t>(own.ties - equal[one], 0);
    if (mask) mark(x + begin, may ? may + begin : nullptr, size, own, mask + begin);
  }
  if (!least) return;
  if (cut.key != NOBODY) {
    *least = least_of(cut, nullptr, 0);
    return;
  }
  int32_t lowest = INT32_MAX;
  for (int64_t i = 0; i < n; i++)
    if (!may || may[i]) lowest = std::min(lowest, key_of(x[i]));
  *least = total ? float_of(lowest) : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

extern "C" {

// mask[g] = the budget[g] greatest allowed entries of row g (all allowed ones if there are fewer), earlier ones of
// equals first; least[g] = the least of them, NaN where there is none. `allowed`, `mask` and `least` may be null.
void crossways_top_of_rows(const float* x, const uint8_t* allowed, const int64_t* budget, int64_t rows, int64_t n,
                           uint8_t* mask, float* least, int64_t threads) {
  if (rows < threads) {
    for (int64_t g = 0; g < rows; g++)
      top_of_long_row(x + g * n, allowed ? allowed + g * n : nullptr, budget[g], n, mask ? mask + g * n : nullptr,
                      least ? least + g : nullptr, threads);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
    std::vector<int32_t> keys(n);
#pragma omp for schedule(dynamic)
    for (int64_t g = 0; g < rows; g++) {
      const uint8_t* may = allowed ? allowed + g * n : nullptr;
      const int64_t count = keys_of_row(x + g * n, may, n, keys.data());
      const Cut cut = cut_of(keys.data(), count, budget[g], scratch);
      if (mask) mark(x + g * n, may, n, cut, mask + g * n);
      if (least) least[g] = least_of(cut, keys.data(), count);
    }
  }
}

// The same for the columns of each group: x (G, N, E), budget and least (G, E). Sixteen columns at a time, one a lane:
// a histogram each, then the few keys of each column's bin.
void crossways_top_of_columns(const float* x, const uint8_t* allowed, const int64_t* budget, int64_t groups, int64_t n,
                              int64_t experts, uint8_t* mask, float* least, int64_t threads) {
  constexpr int BITS = 11;
  const int64_t blocks = (experts + 15) / 16;
#pragma omp parallel num_threads(threads)
  {
    std::vector<int32_t> keys(16 * n), bins(16 << BITS);
    std::vector<int32_t> few[16];
#pragma omp for schedule(dynamic)
    for (int64_t at = 0; at < groups * blocks; at++) {
      const int64_t g = at / blocks, first = at % blocks * 16, column = g * experts + first;
      const __mmask16 real = lanes(experts - first);
      const float* from = x + g * n * experts + first;
      const uint8_t* may = allowed ? allowed + g * n * experts + first : nullptr;
      alignas(64) int32_t bin[16], key[16], ties[16], closed[16];
      __m512i absent = _mm512_setzero_si512();
      std::fill(bins.begin(), bins.end(), 0);
      for (int64_t i = 0; i < n; i++) {
        const __mmask16 open = open_lanes(real, may ? may + i * experts : nullptr);
        const __m512i row = _mm512_mask_mov_epi32(_mm512_set1_epi32(NOBODY), open, keys_of(from + i * experts, real, real));
        absent = _mm512_mask_sub_epi32(absent, __mmask16(~open), absent, _mm512_set1_epi32(-1));
        _mm512_storeu_si512(&keys[16 * i], row);
        _mm512_store_si512(bin, _mm512_srai_epi32(row, 32 - BITS));
        for (int c = 0; c < 16; c++) bins[(c << BITS) + bin[c] + (1 << BITS >> 1)]++;
      }
      _mm512_store_si512(closed, absent);
      int64_t left[16];
      for (int c = 0; c < 16; c++) {
        left[c] = real >> c & 1 ? budget[column + c] : 0;
        few[c].clear();
        key[c] = left[c] <= 0 ? NOTHING.key : EVERYTHING.key;
        ties[c] = left[c] <= 0 ? 0 : INT32_MAX;
        bin[c] = INT32_MIN;  // no key has this bin
        if (left[c] <= 0 || left[c] >= n - closed[c]) continue;
        const int32_t* own = &bins[c << BITS];
        int b = (1 << BITS) - 1;
        for (; own[b] < left[c]; b--) left[c] -= own[b];
        bin[c] = b - (1 << BITS >> 1);
      }
      const __m512i wanted = _mm512_load_si512(bin);
      for (int64_t i = 0; i < n; i++) {
        const __m512i row = _mm512_loadu_si512(&keys[16 * i]);
        for (__mmask16 here = _mm512_cmpeq_epi32_mask(_mm512_srai_epi32(row, 32 - BITS), wanted); here;
             here &= here - 1) {
          const int c = __builtin_ctz(here);
          few[c].push_back(keys[16 * i + c]);
        }
      }
      for (int c = 0; c < 16; c++) {
        if (bin[c] == INT32_MIN) continue;
        // Entries without permission share the lowest bin.
        few[c].erase(std::remove(few[c].begin(), few[c].end(), NOBODY), few[c].end());
        const Cut cut = cut_of_few(few[c], left[c]);
        key[c] = cut.key, ties[c] = int32_t(cut.ties);
      }
      for (int c = 0; least && c < 16; c++) {
        if (!(real >> c & 1)) continue;
        int32_t lowest = INT32_MAX;
        bool any = key[c] != NOBODY && ties[c] > 0;
        for (int64_t i = 0; key[c] == NOBODY && i < n; i++)
          if (keys[16 * i + c] != NOBODY) lowest = std::min(lowest, keys[16 * i + c]), any = true;
        least[column + c] = !any ? std::numeric_limits<float>::quiet_NaN() : float_of(key[c] == NOBODY ? lowest : key[c]);
      }
      if (!mask) continue;
      uint8_t* to = mask + g * n * experts + first;
      const __m512i cuts = _mm512_load_si512(key), none = _mm512_set1_epi32(NOBODY);
      __m512i room = _mm512_load_si512(ties);
      for (int64_t i = 0; i < n; i++) {
        const __m512i row = _mm512_loadu_si512(&keys[16 * i]);
        const __mmask16 open = _mm512_cmpneq_epi32_mask(row, none);
        const __mmask16 tie = _mm512_mask_cmpgt_epi32_mask(_mm512_mask_cmpeq_epi32_mask(open, row, cuts), room,
                                                           _mm512_setzero_si512());
        room = _mm512_mask_sub_epi32(room, tie, room, _mm512_set1_epi32(1));
        const __mmask16 taken = _mm512_mask_cmpgt_epi32_mask(open, row, cuts) | tie;
        _mm_mask_storeu_epi8(to + i * experts, real, _mm_maskz_set1_epi8(taken, 1));
      }
    }
  }
}

// index[t] = the k greatest of the row's n entries, greatest first, earlier ones of equals first; those that are not
// allowed come last. `allowed` may be null.
void crossways_top_k(const float* x, const uint8_t* allowed, int64_t rows, int64_t n, int64_t k, int64_t* index,
                     int64_t threads) {
  const int64_t blocks = (n + 15) / 16;
#pragma omp parallel num_threads(threads)
  {
    std::vector<__m512i> keys(blocks);
#pragma omp for
    for (int64_t t = 0; t < rows; t++) {
      for (int64_t b = 0; b < blocks; b++) {
        const __mmask16 real = lanes(n - b * 16);
        const __mmask16 open = open_lanes(real, allowed ? allowed + t * n + b * 16 : nullptr);
        keys[b] = keys_of(x + t * n + b * 16, real, open);
      }
      for (int64_t j = 0; j < k; j++) {
        __m512i best = keys[0];
        for (int64_t b = 1; b < blocks; b++) best = _mm512_max_epi32(best, keys[b]);
        const __m512i top = _mm512_set1_epi32(_mm512_reduce_max_epi32(best));
        int64_t b = 0;
        __mmask16 found;
        while (!(found = _mm512_cmpeq_epi32_mask(keys[b], top))) b++;
        const int at = __builtin_ctz(found);
        index[t * k + j] = b * 16 + at;
        keys[b] = _mm512_mask_mov_epi32(keys[b], __mmask16(1u << at), _mm512_set1_epi32(NOBODY));
      }
    }
  }
}

// within[t] = the experts of the `kept` best of a token's groups of neighbouring experts. A group's score is the sum
// of its `best` greatest entries; what is not allowed adds nothing, and a group without anything allowed comes last.
void crossways_within_groups(const float* x, const uint8_t* allowed, int64_t rows, int64_t groups, int64_t size,
                             int64_t best, int64_t kept, uint8_t* within, int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t n = groups * size;
    std::vector<int32_t> keys((n + 15) / 16 * 16), top(best), score(groups);
#pragma omp for
    for (int64_t t = 0; t < rows; t++) {
      const uint8_t* may = allowed ? allowed + t * n : nullptr;
      for (int64_t i = 0; i < n; i += 16) {
        const __mmask16 real = lanes(n - i), open = open_lanes(real, may ? may + i : nullptr);
        const __m512i found = keys_of(x + t * n + i, real, real);
        _mm512_storeu_si512(&keys[i], _mm512_mask_mov_epi32(_mm512_set1_epi32(NOBODY), open, found));
      }
      for (int64_t g = 0; g < groups; g++) {
        const int32_t* key = &keys[g * size];
        if (best == 2) {
          int32_t first = NOBODY, second = NOBODY;
          for (int64_t i = 0; i < size; i++) {
            second = std::max(second, std::min(first, key[i]));
            first = std::max(first, key[i]);
          }
          top[0] = first, top[1] = second;
        } else {
          std::partial_sort_copy(key, key + size, top.begin(), top.end(), std::greater<int32_t>());
        }
        float sum = 0;
        for (int32_t one : top) {
          const float value = one == NOBODY ? 0 : float_of(one);
          sum += value == -std::numeric_limits<float>::infinity() ? 0 : value;
        }
        score[g] = top[0] == NOBODY ? NOBODY + 1 : key_of(sum);
      }
      std::memset(within + t * n, 0, n);
      for (int64_t j = 0; j < kept; j++) {
        const int64_t g = std::max_element(score.begin(), score.end()) - score.begin();
        score[g] = NOBODY;
        uint8_t* to = within + t * n + g * size;
        if (may)
          std::copy_n(may + g * size, size, to);
        else
          std::memset(to, 1, size);
      }
    }
  }
}

// served[t, j] = whether the expert that token t asks for in j-th place has room: of its group's tokens it takes the
// first capacity[g, e] that ask, all first choices before second ones, or with `by_token` all choices of one token
// before those of the next. Who asks with a NaN is always served. `asked` may be null.
void crossways_first_come(const float* x, const int64_t* index, const uint8_t* asked, const int64_t* capacity,
                          int64_t groups, int64_t n, int64_t k, int64_t experts, int64_t by_token, uint8_t* served,
                          int64_t threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> left(experts);
#pragma omp for schedule(dynamic)
    for (int64_t g = 0; g < groups; g++) {
      std::copy_n(capacity + g * experts, experts, left.begin());
      auto serve = [&](int64_t t, int64_t j) {
        const int64_t at = t * k + j, e = index[at];
        const bool asks = !asked || asked[at];
        const float value = x[t * experts + e];
        served[at] = asks && (left[e] > 0 || value != value);
        left[e] -= asks;
      };
      const int64_t first = g * n, end = first + n;
      if (by_token) {
        for (int64_t t = first; t < end; t++)
          for (int64_t j = 0; j < k; j++) serve(t, j);
      } else {
        for (int64_t j = 0; j < k; j++)
          for (int64_t t = first; t < end; t++) serve(t, j);
      }
    }
  }
}
}
