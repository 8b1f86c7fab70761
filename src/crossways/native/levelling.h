// Prices of experts that nearly level their loads: what BASE's linear assignment begins with.
//
// Legend: N tokens, E experts, C places per expert.
#pragma once
#include <cmath>
#include <vector>

#include "bits.h"

// Of the one file that includes this, so that all is inlined as if it stood there.
namespace {

constexpr double FAR = std::numeric_limits<double>::infinity();

inline __mmask8 lanes_of_8(int64_t left) { return left >= 8 ? 0xff : __mmask8((1u << left) - 1); }

inline __m512d load(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
inline __m512d load(const double* from) { return _mm512_loadu_pd(from); }
inline __m512d load(const float* from, __mmask8 real) {
  return _mm512_cvtps_pd(_mm256_mask_loadu_ps(_mm256_set1_ps(-INFINITY), real, from));
}
inline __m512d load(const double* from, __mmask8 real) { return _mm512_mask_loadu_pd(_mm512_set1_pd(-FAR), real, from); }

// With `whole`, E is a multiple of 8, and no masks are needed.
template <class Real, bool whole>
struct Levelled {
  const Real* gains;                         // (N, E) of the group's tokens
  int64_t tokens, experts, places, n, wide;  // n: E C, tokens that gain nothing included; wide: E in whole vectors of 8
  std::vector<Real> nothing;                 // (E), what such a token gains
  std::vector<double> price;                 // (wide)

  Levelled(const Real* from, int64_t tokens_, int64_t experts_)
      : gains(from), tokens(tokens_), experts(experts_), places((tokens + experts - 1) / experts), n(places * experts),
        wide((experts + 7) / 8 * 8), nothing(experts, 0), price(wide, 0) {}

  const Real* row(int64_t t) const { return t < tokens ? gains + t * experts : nothing.data(); }

  // What a token gains at eight experts; least where there is none.
  __m512d gain(const Real* row, int64_t e) const {
    return whole ? load(row + e) : load(row + e, lanes_of_8(experts - e));
  }

  bool finite() const {
    __mmask8 odd = 0;
    for (int64_t i = 0; i < tokens * experts; i += 8) {
      const __mmask8 real = lanes_of_8(tokens * experts - i);
      odd |= _mm512_mask_fpclass_pd_mask(real, load(gains + i, real), 0x81 | 0x18);  // NaN, infinities
    }
    return !odd;
  }

  // Where gain and price of a token are greatest; and by how much, over the next best.
  int64_t best(const Real* row, double* lead) const {
    const __m512d none = _mm512_set1_pd(-FAR);
    __m512d first = none, second = none;
    __m512i who = _mm512_setzero_si512();
    for (int64_t e = 0; e < wide; e += 8) {
      const __m512d here = _mm512_add_pd(gain(row, e), _mm512_loadu_pd(&price[e]));
      const __mmask8 better = _mm512_cmp_pd_mask(here, first, _CMP_GT_OQ);
      second = _mm512_max_pd(second, _mm512_min_pd(here, first));
      first = _mm512_mask_mov_pd(first, better, here);
      who = _mm512_mask_mov_epi64(who, better, _mm512_set1_epi64(e));
    }
    const double top = _mm512_reduce_max_pd(first);
    const int lane = __builtin_ctz(_mm512_cmp_pd_mask(first, _mm512_set1_pd(top), _CMP_EQ_OQ));
    *lead = top - _mm512_reduce_max_pd(_mm512_max_pd(second, _mm512_mask_mov_pd(first, __mmask8(1 << lane), none)));
    alignas(64) int64_t begins[8];
    _mm512_store_si512(begins, who);
    return begins[lane] + lane;
  }

  // Everybody's best at these prices, and the mean lead. Returns how many are too many.
  int64_t choose(std::vector<int64_t>& chosen, std::vector<int64_t>& load, double* mean) const {
    std::fill(load.begin(), load.end(), 0);
    *mean = 0;
    double lead = 0;
    for (int64_t t = 0; t < n; t++) {
      load[chosen[t] = best(row(t), &lead)]++;
      *mean += lead / double(n);
    }
    int64_t excess = 0;
    for (int64_t count : load) excess += std::max<int64_t>(count - places, 0);
    return excess;
  }

  // Any prices will do to begin with; the better they level the loads, the fewer tokens are left to push. Loads answer
  // to prices about as those of a softmax would whose temperature is the mean lead, so that this is Sinkhorn's step,
  // shortened because loads are whole. A step costs as much time as `worth` pushes, and the next one saves about a fourth
  // of what the last one did.
  std::vector<int64_t> level() {
    std::vector<int64_t> chosen(n), load(experts), next(n), next_load(experts);
    double lead;
    const int64_t worth = n / 256 + 1;
    int64_t excess = choose(chosen, load, &lead);
    while (excess > worth && std::isfinite(lead)) {
      const std::vector<double> old = price;
      for (int64_t e = 0; e < experts; e++)
        price[e] += 0.7 * lead * std::log((double(places) + 0.5) / (double(load[e]) + 0.5));
      const int64_t left = choose(next, next_load, &lead);
      const bool slow = excess - left < 4 * worth;
      if (left >= excess)
        price = old;
      else
        excess = left, chosen.swap(next), load.swap(next_load);
      if (slow) break;
    }
    return chosen;
  }
};

}  // namespace
