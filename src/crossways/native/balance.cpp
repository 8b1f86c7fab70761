// BASE's linear assignment problem: one expert for each token, at most C tokens for each expert, greatest total gain.
//
// A transportation problem with few destinations, solved exactly by successive shortest paths (Ahuja, Magnanti and
// Orlin 1993, section 9.7). Places that stay free are taken by tokens that gain nothing anywhere, so that every expert
// ends with C. Every token begins with the expert where gain and price are greatest, at prices that nearly level the
// loads; then each token too many is pushed, along the cheapest chain of moves from expert to expert, to one that has
// too few. Prices keep all costs non-negative, so that Dijkstra's algorithm finds the chain among E nodes.
//
// Legend: N tokens, E experts, C places per expert.
#include <omp.h>

#include <cmath>
#include <vector>

#include "bits.h"

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
struct Transport {
  const Real* gains;                         // (N, E) of the group's tokens
  int64_t tokens, experts, places, n, wide;  // n: E C, tokens that gain nothing included; wide: E in whole vectors of 8
  std::vector<Real> nothing;                 // (E), what such a token gains
  std::vector<double> price, distance, open;  // (wide): open is the distance of who has not been visited
  std::vector<int64_t> before;                // on the cheapest chain
  std::vector<std::vector<int64_t>> members;
  std::vector<double> here;    // what members gain where they are
  std::vector<double> cost;    // (E, wide): the least loss of moving one token of a to b
  std::vector<int64_t> mover;  // (E, wide): which token that is

  Transport(const Real* from, int64_t tokens_, int64_t experts_)
      : gains(from), tokens(tokens_), experts(experts_), places((tokens + experts - 1) / experts), n(places * experts),
        wide((experts + 7) / 8 * 8), nothing(experts, 0), price(wide, 0), distance(wide), open(wide), before(wide),
        members(experts), cost(experts * wide, FAR), mover(experts * wide, -1) {
    for (auto& of_expert : members) of_expert.reserve(2 * places);
  }

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

  // Which tokens a loses least by giving away, to eight other experts: to all, or where it would have been t.
  void refresh(int64_t a, int64_t t = -1) {
    here.clear();
    for (const int64_t one : members[a]) here.push_back(row(one)[a]);
    for (int64_t b = 0; b < wide; b += 8)
      if (t < 0 || _mm512_cmpeq_epi64_mask(_mm512_loadu_epi64(&mover[a * wide + b]), _mm512_set1_epi64(t)))
        refresh_eight(a, b);
    cost[a * wide + a] = FAR;
  }

  void refresh_eight(int64_t a, int64_t b) {
    __m512d least = _mm512_set1_pd(FAR);
    __m512i who = _mm512_set1_epi64(-1);
    for (size_t i = 0; i < here.size(); i++) {
      const int64_t t = members[a][i];
      const __m512d loss = _mm512_sub_pd(_mm512_set1_pd(here[i]), gain(row(t), b));
      const __mmask8 better = _mm512_cmp_pd_mask(loss, least, _CMP_LT_OQ);
      least = _mm512_mask_mov_pd(least, better, loss);
      who = _mm512_mask_mov_epi64(who, better, _mm512_set1_epi64(t));
    }
    _mm512_storeu_pd(&cost[a * wide + b], least);
    _mm512_storeu_epi64(&mover[a * wide + b], who);
  }

  // Whether t, which is new, is that token.
  void consider(int64_t a, int64_t t) {
    const Real* of_t = row(t);
    const __m512d here = _mm512_set1_pd(of_t[a]);
    for (int64_t b = 0; b < wide; b += 8) {
      const __m512d loss = _mm512_sub_pd(here, gain(of_t, b));
      const __mmask8 better = _mm512_cmp_pd_mask(loss, _mm512_loadu_pd(&cost[a * wide + b]), _CMP_LT_OQ);
      _mm512_mask_storeu_pd(&cost[a * wide + b], better, loss);
      _mm512_mask_storeu_epi64(&mover[a * wide + b], better, _mm512_set1_epi64(t));
    }
    cost[a * wide + a] = FAR;
  }

  void move(int64_t t, int64_t a, int64_t b) {
    members[a].erase(std::find(members[a].begin(), members[a].end(), t));
    refresh(a, t);
    members[b].push_back(t);
    consider(b, t);
  }

  bool has_room(int64_t e) const { return int64_t(members[e].size()) < places; }

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

  // The nearest expert that was not visited, -1 if none can be reached.
  int64_t nearest() const {
    __m512d least = _mm512_set1_pd(FAR);
    for (int64_t b = 0; b < wide; b += 8) least = _mm512_min_pd(least, _mm512_loadu_pd(&open[b]));
    const double top = _mm512_reduce_min_pd(least);
    if (top == FAR) return -1;
    for (int64_t b = 0;; b += 8)
      if (const __mmask8 here = _mm512_cmp_pd_mask(_mm512_loadu_pd(&open[b]), _mm512_set1_pd(top), _CMP_EQ_OQ))
        return b + __builtin_ctz(here);
  }

  // The last expert of the cheapest chain from `source` to one that has room.
  int64_t search(int64_t source) {
    std::fill(distance.begin(), distance.end(), FAR);
    std::fill(open.begin(), open.end(), FAR);
    distance[source] = open[source] = 0;
    int64_t a;
    while (!has_room(a = nearest())) {
      open[a] = FAR;
      const __m512d so_far = _mm512_set1_pd(distance[a] + price[a]), nearer_than_a = _mm512_set1_pd(distance[a]);
      for (int64_t b = 0; b < wide; b += 8) {
        __m512d there = _mm512_add_pd(so_far, _mm512_loadu_pd(&cost[a * wide + b]));
        // Rounding may leave a cost just below zero; visited ones then stay as near as they are.
        there = _mm512_max_pd(_mm512_sub_pd(there, _mm512_loadu_pd(&price[b])), nearer_than_a);
        const __mmask8 nearer = _mm512_cmp_pd_mask(there, _mm512_loadu_pd(&distance[b]), _CMP_LT_OQ);
        _mm512_mask_storeu_pd(&distance[b], nearer, there);
        _mm512_mask_storeu_pd(&open[b], nearer, there);
        _mm512_mask_storeu_epi64(&before[b], nearer, _mm512_set1_epi64(a));
      }
    }
    const double end = distance[a];
    for (int64_t e = 0; e < experts; e++) price[e] += std::min(distance[e], end);
    return a;
  }

  // `each(t, e)` for every token and its expert. False, without any, if some gain is not finite.
  template <class Each>
  bool solve(Each each) {
    if (!finite()) return false;
    const std::vector<int64_t> start = level();
    for (int64_t t = 0; t < n; t++) members[start[t]].push_back(t);
    for (int64_t a = 0; a < experts; a++) refresh(a);
    for (int64_t source = 0; source < experts; source++)
      while (int64_t(members[source].size()) > places)
        for (int64_t b = search(source); b != source; b = before[b]) move(mover[before[b] * wide + b], before[b], b);
    for (int64_t e = 0; e < experts; e++)
      for (int64_t t : members[e])
        if (t < tokens) each(t, e);
    return true;
  }
};

// Of groups that begin with token starts[g]. Returns 0, and no solution, if some gain is not finite.
template <class Real, class Each>
int solve_groups(const Real* gain, const int64_t* starts, int64_t groups, int64_t experts, int64_t threads, Each each) {
  int finite = 1;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(min : finite)
  for (int64_t g = 0; g < groups; g++) {
    const int64_t first = starts[g], n = starts[g + 1] - first;
    auto here = [&](int64_t t, int64_t e) { each(first + t, e); };
    const Real* own = gain + first * experts;
    const bool solved = experts % 8 ? Transport<Real, false>(own, n, experts).solve(here)
                                    : Transport<Real, true>(own, n, experts).solve(here);
    finite = std::min<int>(finite, solved);
  }
  return finite;
}

}  // namespace

extern "C" {

// chosen[t] = the expert of token t, group by group: tokens starts[g] to starts[g + 1] - 1 share the experts, each of
// which takes at most their number / E, rounded up. gain (N, E) is float, or with `wide` double. Returns 0, and no
// solution, if some gain is not finite.
int crossways_balanced(const void* gain, int64_t wide, const int64_t* starts, int64_t groups, int64_t experts,
                       int64_t* chosen, int64_t threads) {
  auto write = [=](int64_t t, int64_t e) { chosen[t] = e; };
  return wide ? solve_groups(static_cast<const double*>(gain), starts, groups, experts, threads, write)
              : solve_groups(static_cast<const float*>(gain), starts, groups, experts, threads, write);
}

// The same as bits, of float gains.
int crossways_bits_of_balanced(const float* gain, const int64_t* starts, int64_t groups, int64_t experts,
                               uint64_t* words, int64_t threads) {
  const Bits bits(words, experts);
  return solve_groups(gain, starts, groups, experts, threads, [=](int64_t t, int64_t e) {
    std::fill_n(bits.of(t), bits.width, 0);
    bits.add(t, e);
  });
}
}
