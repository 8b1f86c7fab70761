// BASE's linear assignment problem: one expert for each token, at most C tokens for each expert, greatest total gain.
//
// A transportation problem with few destinations, solved exactly by successive shortest paths (Ahuja, Magnanti and
// Orlin 1993, section 9.7). Places that stay free are taken by tokens that gain nothing anywhere, so that every expert
// ends with C. Every token begins with the expert where gain and price are greatest, at prices that nearly level the
// loads (`levelling.h`); then each token too many is pushed, along the cheapest chain of moves from expert to expert, to
// one that has too few. Prices keep all costs non-negative, so that Dijkstra's algorithm finds the chain among E
// nodes.
//
// Legend: N tokens, E experts, C places per expert.
#include <omp.h>

#include <vector>

#include "bits.h"
#include "levelling.h"

namespace {

// `whole` as for `Levelled`.
template <class Real, bool whole>
struct Transport : Levelled<Real, whole> {
  using Base = Levelled<Real, whole>;
  using Base::tokens, Base::experts, Base::places, Base::n, Base::wide, Base::price, Base::row, Base::gain;
  std::vector<double> distance, open;  // (wide): open is the distance of who has not been visited
  std::vector<int64_t> before;         // (wide): on the cheapest chain
  std::vector<std::vector<int64_t>> members;
  std::vector<double> here;    // what members gain where they are
  std::vector<double> cost;    // (E, wide): the least loss of moving one token of a to b
  std::vector<int64_t> mover;  // (E, wide): which token that is

  Transport(const Real* from, int64_t tokens_, int64_t experts_)
      : Base(from, tokens_, experts_), distance(wide), open(wide), before(wide), members(experts),
        cost(experts * wide, FAR), mover(experts * wide, -1) {
    for (auto& of_expert : members) of_expert.reserve(2 * places);
  }

  // Which tokens a loses least by giving away, to every other expert.
  void refresh(int64_t a) {
    look_at_members(a);
    int64_t b = 0;
    for (; b + 64 <= wide; b += 64) refresh_vectors<8>(a, b);
    for (; b < wide; b += 8) refresh_vectors<1>(a, b);
    cost[a * wide + a] = FAR;
  }

  // The same where it would have been t, which is gone.
  void refresh_without(int64_t a, int64_t t) {
    look_at_members(a);
    for (int64_t b = 0; b < wide; b += 8)
      if (_mm512_cmpeq_epi64_mask(_mm512_loadu_epi64(&mover[a * wide + b]), _mm512_set1_epi64(t)))
        refresh_vectors<1>(a, b);
    cost[a * wide + a] = FAR;
  }

  void look_at_members(int64_t a) {
    here.clear();
    for (const int64_t one : members[a]) here.push_back(row(one)[a]);
  }

  // Of so many times eight experts, in registers.
  template <int vectors>
  void refresh_vectors(int64_t a, int64_t b) {
    __m512d least[vectors];
    __m512i who[vectors];
    std::fill_n(least, vectors, _mm512_set1_pd(FAR));
    std::fill_n(who, vectors, _mm512_set1_epi64(-1));
    for (size_t i = 0; i < here.size(); i++) {
      const int64_t t = members[a][i];
      const Real* of_t = row(t);
      const __m512d there = _mm512_set1_pd(here[i]);
      const __m512i name = _mm512_set1_epi64(t);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; v++) {
        const __m512d loss = _mm512_sub_pd(there, gain(of_t, b + 8 * v));
        const __mmask8 better = _mm512_cmp_pd_mask(loss, least[v], _CMP_LT_OQ);
        least[v] = _mm512_mask_mov_pd(least[v], better, loss);
        who[v] = _mm512_mask_mov_epi64(who[v], better, name);
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++) {
      _mm512_storeu_pd(&cost[a * wide + b + 8 * v], least[v]);
      _mm512_storeu_epi64(&mover[a * wide + b + 8 * v], who[v]);
    }
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
    refresh_without(a, t);
    members[b].push_back(t);
    consider(b, t);
  }

  bool has_room(int64_t e) const { return int64_t(members[e].size()) < places; }

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
    if (!this->turn()) return false;
    const std::vector<int64_t> start = this->level();
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
