// Experts with few places: who asks first is served. Capacity by position.
//
// Legend: T tokens, E experts, K experts per token, G groups of N tokens.
#include <omp.h>

#include <vector>

#include "bits.h"

extern "C" {

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
