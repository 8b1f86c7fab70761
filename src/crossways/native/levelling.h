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

// Sixteen as floats. What is not finite makes `broken` no number.
inline __m512 load_floats(const float* from, __mmask16 real, __m512* broken) {
  const __m512 here = _mm512_maskz_loadu_ps(real, from);
  *broken = _mm512_fmadd_ps(here, _mm512_setzero_ps(), *broken);
  return here;
}
inline __m512 load_floats(const double* from, __mmask16 real, __m512* broken) {
  auto joined = [](__m512d low, __m512d high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low)), _mm512_cvtpd_ps(high), 1);
  };
  const __m512d low = _mm512_maskz_loadu_pd(__mmask8(real), from), none = _mm512_setzero_pd();
  const __m512d high = _mm512_maskz_loadu_pd(__mmask8(real >> 8), from + 8);
  *broken = _mm512_add_ps(*broken, joined(_mm512_mul_pd(low, none), _mm512_mul_pd(high, none)));
  return joined(low, high);
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

// Where tokens are at some prices.
struct Places {
  std::vector<int32_t> expert;  // (N in whole blocks): each token's best
  std::vector<float> lead;      // (N in whole blocks): by how much, at the least
  std::vector<int64_t> load;    // (E)
  double mean = 0;              // of the leads
  int64_t excess = 0;           // how many tokens are too many where they are

  Places(int64_t tokens, int64_t experts) : expert(tokens), lead(tokens), load(experts) {}
};

// With `whole`, E is a multiple of 8, and no masks are needed.
template <class Real, bool whole>
struct Levelled {
  static constexpr int64_t BLOCK = 32;       // tokens that are looked at together, so that none waits for the other
  const Real* gains;                         // (N, E) of the group's tokens
  int64_t tokens, experts, places, n, wide;  // n: E C, tokens that gain nothing included; wide: E in whole vectors of 8
  std::vector<Real> nothing;                 // (E), what such a token gains
  std::vector<double> price;                 // (wide), all of them floats
  Turned turned;                             // (N in whole blocks, E): of each expert, a token a lane
  __m512 broken = _mm512_setzero_ps();       // no number once a gain was turned that is not finite

  Levelled(const Real* from, int64_t tokens_, int64_t experts_)
      : gains(from), tokens(tokens_), experts(experts_), places((tokens + experts - 1) / experts), n(places * experts),
        wide((experts + 7) / 8 * 8), nothing(experts, 0), price(wide, 0), turned(blocks() * BLOCK / 16 * experts) {}

  int64_t blocks() const { return (n + BLOCK - 1) / BLOCK; }

  const Real* row(int64_t t) const { return t < tokens ? gains + t * experts : nothing.data(); }

  // What a token gains at eight experts; least where there is none.
  __m512d gain(const Real* row, int64_t e) const {
    return whole ? load(row + e) : load(row + e, lanes_of_8(experts - e));
  }

  // Fills `turned` for sixteen tokens.
  void turn(int64_t first) {
    __m512i square[16];
    for (int64_t e = 0; e < experts; e += 16) {
      const __mmask16 real = lanes(experts - e);
      for (int64_t i = 0; i < 16; i++) {
        const Real* from = row(first + i);
        __builtin_prefetch(from + 2 * BLOCK * experts + e);
        square[i] = _mm512_castps_si512(load_floats(from + e, real, &broken));
      }
      crossways::transpose(square);
      for (int64_t i = 0; i < std::min<int64_t>(16, experts - e); i++)
        _mm512_store_si512(turned.at(first / 16 * experts + e + i), square[i]);
    }
  }

  bool finite() const { return !_mm512_cmp_ps_mask(broken, broken, _CMP_UNORD_Q); }

  // Where gain and price of a token are greatest, in doubles.
  int32_t best(const Real* row) const {
    __m512d most = _mm512_set1_pd(-FAR);
    auto value = [&](int64_t e) { return _mm512_add_pd(gain(row, e), _mm512_loadu_pd(&price[e])); };
    for (int64_t e = 0; e < wide; e += 8) most = _mm512_max_pd(most, value(e));
    const __m512d top = _mm512_set1_pd(_mm512_reduce_max_pd(most));
    for (int64_t e = 0; e < wide; e += 8)
      if (const __mmask8 here = _mm512_cmp_pd_mask(value(e), top, _CMP_EQ_OQ))
        return int32_t(e + __builtin_ctz(here));
    return 0;  // of gains that are not finite
  }

  // Of a block: whose gain and price are greatest, how great, and how great the next ones.
  void rank(int64_t first, const float* by, __m512i* who, __m512* top, __m512* next) const {
    const float* here[2] = {turned.at(first / 16 * experts), turned.at((first / 16 + 1) * experts)};
    for (int i = 0; i < 2; i++) who[i] = _mm512_setzero_si512(), top[i] = next[i] = _mm512_set1_ps(-INFINITY);
    for (int64_t e = 0; e < experts; e++) {
      const __m512 price_of = _mm512_set1_ps(by[e]);
      for (int i = 0; i < 2; i++) {
        const __m512 value = _mm512_add_ps(_mm512_load_ps(here[i] + 16 * e), price_of);
        who[i] = _mm512_mask_mov_epi32(who[i], _mm512_cmp_ps_mask(value, top[i], _CMP_GT_OQ),
                                       _mm512_set1_epi32(int32_t(e)));
        next[i] = _mm512_max_ps(next[i], _mm512_min_ps(value, top[i]));
        top[i] = _mm512_max_ps(top[i], value);
      }
    }
  }

  // Everybody's best at these prices. The `first_time`, tokens are turned on the way.
  void choose(bool first_time, Places& found) {
    std::fill(found.load.begin(), found.load.end(), 0);
    const std::vector<float> by(price.begin(), price.end());
    float dear = 0;
    for (float one : by) dear = std::max(dear, std::abs(one));
    const __m512 doubt = _mm512_set1_ps(1e-6f), most = _mm512_set1_ps(dear);
    __m512 leads = _mm512_setzero_ps();
    for (int64_t first = 0; first < n; first += BLOCK) {
      if (first_time) turn(first), turn(first + 16);
      __m512 top[2], next[2];
      __m512i who[2];
      rank(first, by.data(), who, top, next);
      for (int i = 0; i < 2; i++) {
        const int64_t at = first + 16 * i;
        const __mmask16 real = lanes(n - at);
        const __m512 size = _mm512_add_ps(_mm512_add_ps(_mm512_abs_ps(top[i]), _mm512_abs_ps(next[i])), most);
        const __m512 lead = _mm512_fnmadd_ps(doubt, size, _mm512_sub_ps(top[i], next[i]));
        leads = _mm512_mask_add_ps(leads, real, leads, lead);
        _mm512_storeu_ps(&found.lead[at], lead);
        _mm512_storeu_si512(&found.expert[at], who[i]);
        __mmask16 unsure = real & _mm512_cmp_ps_mask(lead, _mm512_setzero_ps(), _CMP_NGT_UQ);
        for (; unsure; unsure &= unsure - 1) {
          const int64_t t = at + __builtin_ctz(unsure);
          found.expert[t] = best(row(t));
        }
      }
      for (int64_t t = first; t < std::min(first + BLOCK, n); t++) found.load[found.expert[t]]++;
    }
    found.mean = _mm512_reduce_add_ps(leads) / double(n);
    found.excess = 0;
    for (int64_t count : found.load) found.excess += std::max<int64_t>(count - places, 0);
  }

  // Any prices will do to begin with; the better they level the loads, the fewer tokens are left to push. Loads answer
  // to prices about as those of a softmax would whose temperature is the mean lead, so that this is Sinkhorn's step,
  // a little shortened because loads are whole. A step costs as much time as `worth` pushes, and the next one saves
  // about a fourth of what the last one did. Everybody is then at their best at `price`. Of no use unless all gains are
  // finite.
  Places level() {
    Places found(blocks() * BLOCK, experts), next = found;
    const int64_t worth = n / 256 + 1;
    choose(true, found);
    double mean = found.mean;
    while (finite() && found.excess > worth && std::isfinite(mean)) {
      const std::vector<double> old = price;
      for (int64_t e = 0; e < experts; e++) {
        const double asked = std::log((double(places) + 0.5) / (double(found.load[e]) + 0.5));
        price[e] = float(price[e] + float(0.85 * mean * asked));
      }
      choose(false, next);
      mean = next.mean;
      const bool slow = found.excess - next.excess < 4 * worth;
      if (next.excess >= found.excess)
        price = old;
      else
        std::swap(found, next);
      if (slow) break;
    }
    return found;
  }
};

}  // namespace
