// Experts with few places: who asks first is served. Capacity by position.
//
// Legend: T tokens, E experts, K experts per token, G groups of N tokens.
#include "cuts.h"
#include "sixteen.h"

namespace {

// Whom tokens ask, in order: (K, T), an expert, or one of these. What a NaN asks for is marked.
constexpr int32_t NOBODY_ASKED = -1, BROKEN = 1 << 30;

std::vector<int32_t> asked_by(const float* x, const Allowed& may, int64_t tokens, int64_t k, int64_t threads) {
  std::vector<int32_t> asked(k * tokens);
  int32_t* to = asked.data();
  for_sixteens(x, may, tokens, k, threads, [=](Sixteen& found, int64_t first, int64_t count) {
    found.rank(k);
    for (int64_t j = 0; j < k; j++) {
      const __mmask16 broken = _mm512_cmpeq_epi32_mask(found.best[j], _mm512_set1_epi32(INT32_MAX));
      const __m512i who = _mm512_mask_or_epi32(found.index[j], broken, found.index[j], _mm512_set1_epi32(BROKEN));
      const __m512i nobody = _mm512_set1_epi32(NOBODY_ASKED);
      _mm512_mask_storeu_epi32(to + j * tokens + first, lanes(count),
                               _mm512_mask_mov_epi32(nobody, found.open(j), who));
    }
  });
  return asked;
}

// serve(t, j) for the k choices j of tokens [first, end): all of one token before those of the next, or else all first
// choices before second ones.
template <class Serve>
void in_turn(bool by_token, int64_t first, int64_t end, int64_t k, const Serve& serve) {
  if (by_token) {
    for (int64_t t = first; t < end; t++)
      for (int64_t j = 0; j < k; j++) serve(t, j);
  } else {
    for (int64_t j = 0; j < k; j++)
      for (int64_t t = first; t < end; t++) serve(t, j);
  }
}

}  // namespace

extern "C" {

// Bits of who is served where every token asks its k greatest allowed experts: of its group's tokens an expert takes
// the first capacity[g, e] that ask, all first choices before second ones, or with `by_token` all choices of one token
// before those of the next. Who asks with a NaN is always served.
void crossways_bits_of_first_best(const float* x, const uint64_t* allowed, const int64_t* capacity, int64_t group_step,
                                  int64_t column_step, int64_t groups, int64_t n, int64_t experts, int64_t k,
                                  int64_t by_token, uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
  const Budgets capacities{capacity, group_step, column_step};
  const int64_t tokens = groups * n;
  const std::vector<int32_t> asked = asked_by(x, Allowed(allowed, experts), tokens, k, threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> left(experts);
    auto serve = [&](int64_t t, int64_t j) {
      const int32_t who = asked[j * tokens + t];
      if (who == NOBODY_ASKED) return;
      const int64_t e = who & ~BROKEN;
      const bool place = (left[e]-- > 0) | (who >= BROKEN);
      bits.of(t)[e / 64] |= uint64_t(place) << e % 64;  // whether there is one cannot be foreseen: no branch
    };
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
      for (int64_t e = 0; e < experts; e++) left[e] = capacities.of(g, e);
      const int64_t first = g * n, end = first + n;
      std::fill(bits.of(first), bits.of(end), 0);
      in_turn(by_token, first, end, k, serve);
    }
  }
}

// Bits of who is served: of its group's tokens an expert takes the first capacity[g, e] that ask, all first choices
// before second ones, or with `by_token` all choices of one token before those of the next. Who asks with a NaN is
// always served. index (T, K) holds whom a token asks, in order; asked (T, K), whether it does, may be null.
void crossways_bits_of_first_come(const float* x, const int64_t* index, const uint8_t* asked, const int64_t* capacity,
                                  int64_t group_step, int64_t column_step, int64_t groups, int64_t n, int64_t k,
                                  int64_t experts, int64_t by_token, uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
#pragma omp parallel num_threads(threads)
  {
    std::vector<int64_t> left(experts);
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++) {
      for (int64_t e = 0; e < experts; e++) left[e] = capacity[g * group_step + e * column_step];
      auto serve = [&](int64_t t, int64_t j) {
        const int64_t e = index[t * k + j];
        if (asked && !asked[t * k + j]) return;
        const float value = x[t * experts + e];
        if (left[e]-- > 0 || value != value) bits.add(t, e);
      };
      const int64_t first = g * n, end = first + n;
      std::fill(bits.of(first), bits.of(end), 0);
      in_turn(by_token, first, end, k, serve);
    }
  }
}
}
