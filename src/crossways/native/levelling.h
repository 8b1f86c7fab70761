// Prices of experts that nearly level their loads: what BASE's linear assignment begins with.
//
// Any prices will do, so that they are found in floats, sixteen tokens at a time. But what is chosen at them has to be
// what is best in doubles: where the lead of a token's best expert may be rounding, it is looked at again.
//
// Legend: N tokens, E experts, C places per expert.
#pragma once
#include <cmath>
#include <vector>

#include "bits.h"
#include "simd.h"

// Of the one file that includes this, so that all is inlined as if it stood there.
namespace {

constexpr double FAR = std::numeric_limits<double>::infinity();

inline __mmask8 lanes_of_8(int64_t left) { return left >= 8 ? 0xff : left <= 0 ? 0 : __mmask8((1u << left) - 1); }

inline __m512d load(const float* from) { return _mm512_cvtps_pd(_mm256_loadu_ps(from)); }
inline __m512d load(const double* from) { return _mm512_loadu_pd(from); }
inline __m512d load(const float* from, __mmask8 real) {
  return _mm512_cvtps_pd(_mm256_mask_loadu_ps(_mm256_set1_ps(-INFINITY), real, from));
}
inline __m512d load(const double* from, __mmask8 real) { return _mm512_mask_loadu_pd(_mm512_set1_pd(-FAR), real, from); }

// Sixteen as floats; whether all are finite.
constexpr int ODD = 0x81 | 0x18;  // classes of floats: NaN, infinities
inline __m512 load_floats(const float* from, __mmask16 real, bool* finite) {
  const __m512 here = _mm512_maskz_loadu_ps(real, from);
  *finite &= !_mm512_fpclass_ps_mask(here, ODD);
  return here;
}
inline __m512 load_floats(const double* from, __mmask16 real, bool* finite) {
  const __m512d low = _mm512_maskz_loadu_pd(__mmask8(real), from);
  const __m512d high = _mm512_maskz_loadu_pd(__mmask8(real >> 8), from + 8);
  *finite &= !(_mm512_fpclass_pd_mask(low, ODD) | _mm512_fpclass_pd_mask(high, ODD));
  return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
}

// Vectors of a thread. Kept from one group, and one call, to the next, as fresh memory has to be cleared by the system.
class Turned {
 public:
  explicit Turned(size_t vectors) {
    const size_t floats = 16 * (vectors + 1);
    if (room_.size() < floats) {
      room_.clear();  // instead of moving what is there
      room_.resize(floats);
    }
    first_ = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(room_.data()) + 63) / 64 * 64);
  }
  ~Turned() {
    constexpr size_t KEEP = 1 << 20;
    if (room_.size() > KEEP) std::vector<float>().swap(room_);
  }
  Turned(const Turned&) = delete;
  Turned& operator=(const Turned&) = delete;
  float* at(size_t vector) const { return first_ + 16 * vector; }

 private:
  inline static thread_local std::vector<float> room_;
  float* first_;
};

// With `whole`, E is a multiple of 8, and no masks are needed.
template <class Real, bool whole>
struct Levelled {
  const Real* gains;                         // (N, E) of the group's tokens
  int64_t tokens, experts, places, n, wide;  // n: E C, tokens that gain nothing included; wide: E in whole vectors of 8
  std::vector<Real> nothing;                 // (E), what such a token gains
  std::vector<double> price;                 // (wide), all of them floats
  Turned turned;                             // (N in whole sixteens, E): of each expert, a token a lane

  Levelled(const Real* from, int64_t tokens_, int64_t experts_)
      : gains(from), tokens(tokens_), experts(experts_), places((tokens + experts - 1) / experts), n(places * experts),
        wide((experts + 7) / 8 * 8), nothing(experts, 0), price(wide, 0), turned((n + 15) / 16 * experts) {}

  const Real* row(int64_t t) const { return t < tokens ? gains + t * experts : nothing.data(); }

  // What a token gains at eight experts; least where there is none.
  __m512d gain(const Real* row, int64_t e) const {
    return whole ? load(row + e) : load(row + e, lanes_of_8(experts - e));
  }

  // Fills `turned`. False if some gain is not finite.
  bool turn() {
    bool finite = true;
    __m512i square[16];
    for (int64_t first = 0; first < n; first += 16)
      for (int64_t e = 0; e < experts; e += 16) {
        const __mmask16 real = lanes(experts - e);
        for (int64_t i = 0; i < 16; i++) {
          const Real* from = row(first + i);
          __builtin_prefetch(from + 16 * experts + e);
          square[i] = _mm512_castps_si512(load_floats(from + e, real, &finite));
        }
        crossways::transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(16, experts - e); i++)
          _mm512_store_si512(turned.at(first / 16 * experts + e + i), square[i]);
      }
    return finite;
  }

  // Where gain and price of a token are greatest, in doubles.
  int64_t best(const Real* row) const {
    __m512d most = _mm512_set1_pd(-FAR);
    auto value = [&](int64_t e) { return _mm512_add_pd(gain(row, e), _mm512_loadu_pd(&price[e])); };
    for (int64_t e = 0; e < wide; e += 8) most = _mm512_max_pd(most, value(e));
    const __m512d top = _mm512_set1_pd(_mm512_reduce_max_pd(most));
    for (int64_t e = 0;; e += 8)
      if (const __mmask8 here = _mm512_cmp_pd_mask(value(e), top, _CMP_EQ_OQ)) return e + __builtin_ctz(here);
  }

  // Everybody's best at these prices, and the mean lead. Returns how many are too many.
  int64_t choose(std::vector<int64_t>& chosen, std::vector<int64_t>& load, double* mean) const {
    std::fill(load.begin(), load.end(), 0);
    const std::vector<float> by(price.begin(), price.end());
    float dear = 0;
    for (float one : by) dear = std::max(dear, std::abs(one));
    const __m512 doubt = _mm512_set1_ps(1e-6f), most = _mm512_set1_ps(dear);
    __m512 leads = _mm512_setzero_ps();
    for (int64_t first = 0; first < n; first += 16) {
      const float* here = turned.at(first / 16 * experts);
      __m512 top = _mm512_set1_ps(-INFINITY), next = top;
      __m512i who = _mm512_setzero_si512();
      for (int64_t e = 0; e < experts; e++) {
        const __m512 value = _mm512_add_ps(_mm512_load_ps(here + 16 * e), _mm512_set1_ps(by[e]));
        who = _mm512_mask_mov_epi32(who, _mm512_cmp_ps_mask(value, top, _CMP_GT_OQ), _mm512_set1_epi32(int32_t(e)));
        next = _mm512_max_ps(next, _mm512_min_ps(value, top));
        top = _mm512_max_ps(top, value);
      }
      const __mmask16 real = lanes(n - first);
      const __m512 lead = _mm512_sub_ps(top, next);
      leads = _mm512_mask_add_ps(leads, real, leads, lead);
      const __m512 size = _mm512_add_ps(_mm512_add_ps(_mm512_abs_ps(top), _mm512_abs_ps(next)), most);
      __mmask16 unsure = real & _mm512_cmp_ps_mask(lead, _mm512_mul_ps(doubt, size), _CMP_NGT_UQ);
      alignas(64) int32_t experts_of[16];
      _mm512_store_si512(experts_of, who);
      for (; unsure; unsure &= unsure - 1) {
        const int64_t i = __builtin_ctz(unsure);
        experts_of[i] = int32_t(best(row(first + i)));
      }
      for (int64_t i = 0; i < std::min<int64_t>(16, n - first); i++) load[chosen[first + i] = experts_of[i]]++;
    }
    *mean = _mm512_reduce_add_ps(leads) / double(n);
    int64_t excess = 0;
    for (int64_t count : load) excess += std::max<int64_t>(count - places, 0);
    return excess;
  }

  // Any prices will do to begin with; the better they level the loads, the fewer tokens are left to push. Loads answer
  // to prices about as those of a softmax would whose temperature is the mean lead, so that this is Sinkhorn's step,
  // a little shortened because loads are whole. A step costs as much time as `worth` pushes, and the next one saves
  // about a fourth of what the last one did.
  std::vector<int64_t> level() {
    std::vector<int64_t> chosen(n), load(experts), next(n), next_load(experts);
    double lead;
    const int64_t worth = n / 256 + 1;
    int64_t excess = choose(chosen, load, &lead);
    while (excess > worth && std::isfinite(lead)) {
      const std::vector<double> old = price;
      for (int64_t e = 0; e < experts; e++)
        price[e] += float(0.85 * lead * std::log((double(places) + 0.5) / (double(load[e]) + 0.5)));
      for (double& one : price) one = float(one);
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
