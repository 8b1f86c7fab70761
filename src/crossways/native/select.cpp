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

void mark(const float* x, const uint8_t* may, int64_t n, Cut cut, uint8_t* mask) {
  for (int64_t i = 0; i < n; i++) mask[i] = (!may || may[i]) && takes(cut, key_of(x[i]));
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

// The same for the columns of each group: x (G, N, E), budget and least (G, E). Sixteen columns at a time, so that
// memory is read in lines.
void crossways_top_of_columns(const float* x, const uint8_t* allowed, const int64_t* budget, int64_t groups, int64_t n,
                              int64_t experts, uint8_t* mask, float* least, int64_t threads) {
  const int64_t blocks = (experts + 15) / 16;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch;
    std::vector<int32_t> keys(16 * n);
    int64_t count[16];
#pragma omp for schedule(dynamic)
    for (int64_t at = 0; at < groups * blocks; at++) {
      const int64_t g = at / blocks, first = at % blocks * 16, wide = std::min<int64_t>(16, experts - first);
      const float* from = x + g * n * experts + first;
      const uint8_t* may = allowed ? allowed + g * n * experts + first : nullptr;
      std::fill_n(count, 16, 0);
      for (int64_t i = 0; i < n; i++)
        for (int64_t c = 0; c < wide; c++) {
          keys[c * n + count[c]] = key_of(from[i * experts + c]);
          count[c] += !may || may[i * experts + c];
        }
      alignas(64) int32_t key[16], ties[16];
      for (int64_t c = 0; c < 16; c++) {
        const int64_t column = g * experts + first + c;
        const Cut cut = c < wide ? cut_of(keys.data() + c * n, count[c], budget[column], scratch) : NOTHING;
        if (c < wide && least) least[column] = least_of(cut, keys.data() + c * n, count[c]);
        key[c] = cut.key, ties[c] = int32_t(std::min<int64_t>(cut.ties, INT32_MAX));
      }
      if (!mask) continue;
      uint8_t* to = mask + g * n * experts + first;
      const __m512i cuts = _mm512_load_si512(key), one = _mm512_set1_epi32(1);
      const __mmask16 real = __mmask16((1u << wide) - 1);
      __m512i left = _mm512_load_si512(ties);
      for (int64_t i = 0; i < n; i++) {
        const __mmask16 open =
            may ? _mm_mask_test_epi8_mask(real, _mm_maskz_loadu_epi8(real, may + i * experts), _mm_set1_epi8(-1)) : real;
        const __m512i row = keys_of(from + i * experts, real, real);
        const __mmask16 tie = _mm512_mask_cmpgt_epi32_mask(_mm512_mask_cmpeq_epi32_mask(open, row, cuts), left,
                                                           _mm512_setzero_si512());
        left = _mm512_mask_sub_epi32(left, tie, left, one);
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
        const __mmask16 real = b * 16 + 16 <= n ? 0xffff : __mmask16((1u << (n - b * 16)) - 1);
        const uint8_t* may = allowed ? allowed + t * n + b * 16 : nullptr;
        const __mmask16 open =
            may ? _mm_mask_test_epi8_mask(real, _mm_maskz_loadu_epi8(real, may), _mm_set1_epi8(-1)) : real;
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
    std::vector<int32_t> top(best), score(groups);
#pragma omp for
    for (int64_t t = 0; t < rows; t++) {
      for (int64_t g = 0; g < groups; g++) {
        const int64_t first = (t * groups + g) * size;
        std::fill(top.begin(), top.end(), NOBODY);
        bool any = !allowed;
        for (int64_t i = 0; i < size; i++) {
          const bool open = !allowed || allowed[first + i];
          any |= open;
          int32_t key = open ? key_of(x[first + i]) : NOBODY;
          for (int64_t b = 0; b < best; b++) {
            const int32_t more = std::max(top[b], key);
            key = std::min(top[b], key), top[b] = more;
          }
        }
        float sum = 0;
        for (int64_t b = 0; b < best; b++) {
          const float value = top[b] == NOBODY ? 0 : float_of(top[b]);
          sum += value == -std::numeric_limits<float>::infinity() ? 0 : value;
        }
        score[g] = any ? key_of(sum) : NOBODY + 1;
      }
      std::memset(within + t * groups * size, 0, groups * size);
      for (int64_t j = 0; j < kept; j++) {
        const int64_t g = std::max_element(score.begin(), score.end()) - score.begin();
        score[g] = NOBODY;
        uint8_t* to = within + (t * groups + g) * size;
        const uint8_t* may = allowed ? allowed + (t * groups + g) * size : nullptr;
        for (int64_t i = 0; i < size; i++) to[i] = !may || may[i];
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
