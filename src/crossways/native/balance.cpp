// BASE's linear assignment problem: one expert for each token, at most C tokens for each expert, greatest total gain.
//
// A transportation problem with few destinations, solved exactly by successive shortest paths (Ahuja, Magnanti and
// Orlin 1993, section 9.7). Places that stay free are taken by tokens that gain nothing anywhere, so that every expert
// ends with C. Every token begins with the expert where gain and price are greatest, at prices that nearly level the
// loads (`levelling.h`); then each token too many is pushed, along the cheapest chain of moves from expert to expert, to
// one that has too few. Prices keep all costs non-negative, so that Dijkstra's algorithm finds the chain among E
// nodes.
//
// Few tokens are near to being moved, so that only these are looked at: a chain that costs less than any move of the
// others, of which it is known how much better their first expert is, is the cheapest of all.
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
  static constexpr int32_t NONE = -1;
  Places at;
  std::vector<double> start;            // (wide): prices at which leads are known
  double reach = 0, apart = 0;          // who led by more was not looked at; how far prices moved apart since then
  std::vector<int32_t> first, after;    // (E), (N): an expert's tokens that may be moved, one after the other
  std::vector<int32_t> members;         // the same of one expert
  std::vector<double> here;             // what they gain where they are
  std::vector<double> distance, open;   // (wide): open is the distance of who has not been visited
  std::vector<int64_t> before;          // (wide): on the cheapest chain
  std::vector<double> cost;             // (E, wide): the least loss of moving one token of a to b
  std::vector<int64_t> mover;           // (E, wide): which token that is

  Transport(const Real* from, int64_t tokens_, int64_t experts_)
      : Base(from, tokens_, experts_), at(this->level()), start(price), first(experts), after(n), distance(wide),
        open(wide), before(wide), cost(experts * wide), mover(experts * wide) {}

  // Whoever led by so much at most.
  void look_at(double lead) {
    reach = lead;
    std::fill(first.begin(), first.end(), NONE);
    for (int64_t t = n; t-- > 0;)
      if (!(at.lead[t] > reach)) after[t] = first[at.expert[t]], first[at.expert[t]] = int32_t(t);
    for (int64_t a = 0; a < experts; a++) refresh(a);
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
    here.clear(), members.clear();
    for (int32_t t = first[a]; t != NONE; t = after[t]) members.push_back(t), here.push_back(row(t)[a]);
  }

  // Of so many times eight experts, in registers.
  template <int vectors>
  void refresh_vectors(int64_t a, int64_t b) {
    __m512d least[vectors];
    __m512i who[vectors];
    std::fill_n(least, vectors, _mm512_set1_pd(FAR));
    std::fill_n(who, vectors, _mm512_set1_epi64(NONE));
    for (size_t i = 0; i < here.size(); i++) {
      const Real* of_t = row(members[i]);
      const __m512d there = _mm512_set1_pd(here[i]);
      const __m512i name = _mm512_set1_epi64(members[i]);
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
    const __m512d here_of_t = _mm512_set1_pd(of_t[a]);
    for (int64_t b = 0; b < wide; b += 8) {
      const __m512d loss = _mm512_sub_pd(here_of_t, gain(of_t, b));
      const __m512d least = _mm512_loadu_pd(&cost[a * wide + b]);
      const __m512i who = _mm512_loadu_epi64(&mover[a * wide + b]);
      const __mmask8 better = _mm512_cmp_pd_mask(loss, least, _CMP_LT_OQ);
      _mm512_storeu_pd(&cost[a * wide + b], _mm512_min_pd(loss, least));
      _mm512_storeu_epi64(&mover[a * wide + b], _mm512_mask_mov_epi64(who, better, _mm512_set1_epi64(t)));
    }
    cost[a * wide + a] = FAR;
  }

  void move(int64_t t, int64_t a, int64_t b) {
    int32_t* link = &first[a];
    while (*link != t) link = &after[*link];
    *link = after[t];
    refresh_without(a, t);
    after[t] = first[b], first[b] = int32_t(t);
    consider(b, t);
    at.load[a]--, at.load[b]++, at.expert[t] = int32_t(b);
    at.lead[t] = -INFINITY;  // to be looked at in any case
  }

  bool has_room(int64_t e) const { return at.load[e] < places; }

  // The nearest expert that was not visited, NONE if none can be reached.
  int64_t nearest() const {
    __m512d least = _mm512_set1_pd(FAR);
    for (int64_t b = 0; b < wide; b += 8) least = _mm512_min_pd(least, _mm512_loadu_pd(&open[b]));
    const double top = _mm512_reduce_min_pd(least);
    if (top == FAR) return NONE;
    for (int64_t b = 0;; b += 64) {
      uint64_t found = 0;  // no branches, as who it is cannot be foreseen
      for (int64_t v = b; v < std::min(b + 64, wide); v += 8)
        found |= uint64_t(_mm512_cmp_pd_mask(_mm512_loadu_pd(&open[v]), _mm512_set1_pd(top), _CMP_EQ_OQ)) << (v - b);
      if (found) return b + __builtin_ctzll(found);
    }
  }

  // The last expert of the cheapest chain from `source` to one that has room, among the moves that are known; NONE if
  // it leads nowhere.
  int64_t known_chain(int64_t source) {
    std::fill(distance.begin(), distance.end(), FAR);
    std::fill(open.begin(), open.end(), FAR);
    distance[source] = open[source] = 0;
    int64_t a;
    while ((a = nearest()) != NONE && !has_room(a)) {
      open[a] = FAR;
      const __m512d so_far = _mm512_set1_pd(distance[a] + price[a]), nearer_than_a = _mm512_set1_pd(distance[a]);
      for (int64_t b = 0; b < wide; b += 8) {
        __m512d there = _mm512_add_pd(so_far, _mm512_loadu_pd(&cost[a * wide + b]));
        // Rounding may leave a cost just below zero; visited ones then stay as near as they are.
        there = _mm512_max_pd(_mm512_sub_pd(there, _mm512_loadu_pd(&price[b])), nearer_than_a);
        const __m512d known = _mm512_loadu_pd(&distance[b]);
        const __mmask8 nearer = _mm512_cmp_pd_mask(there, known, _CMP_LT_OQ);
        // Whole vectors, as what is stored under a mask has to reach the cache before it can be read again.
        _mm512_storeu_pd(&distance[b], _mm512_min_pd(there, known));
        _mm512_storeu_pd(&open[b], _mm512_mask_mov_pd(_mm512_loadu_pd(&open[b]), nearer, there));
        const __m512i last = _mm512_loadu_epi64(&before[b]);
        _mm512_storeu_epi64(&before[b], _mm512_mask_mov_epi64(last, nearer, _mm512_set1_epi64(a)));
      }
    }
    return a;
  }

  // The same among all moves: who was not looked at still leads by as much of `reach` as prices did not move apart.
  int64_t search(int64_t source) {
    int64_t last;
    while ((last = known_chain(source)) == NONE || apart + distance[last] > reach)
      look_at(reach < at.mean ? at.mean : FAR);
    raise(_mm512_set1_pd(distance[last]));
    return last;
  }

  // Prices, by the distances up to the end of a chain.
  void raise(__m512d end) {
    __m512d least = _mm512_set1_pd(FAR), most = _mm512_set1_pd(-FAR);
    for (int64_t e = 0; e < wide; e += 8) {
      const __mmask8 real = lanes_of_8(experts - e);
      const __m512d rise = _mm512_min_pd(_mm512_loadu_pd(&distance[e]), end);
      const __m512d now = _mm512_add_pd(_mm512_loadu_pd(&price[e]), rise);
      const __m512d moved = _mm512_sub_pd(now, _mm512_loadu_pd(&start[e]));
      _mm512_storeu_pd(&price[e], now);
      least = _mm512_mask_min_pd(least, real, least, moved), most = _mm512_mask_max_pd(most, real, most, moved);
    }
    apart = _mm512_reduce_max_pd(most) - _mm512_reduce_min_pd(least);
  }

  // `each(t, e)` for every token and its expert. False, without any, if some gain is not finite.
  template <class Each>
  bool solve(Each each) {
    if (!this->finite()) return false;
    // Loads differ by a few tokens, and so prices will move by a part of the mean lead.
    if (at.excess) look_at(at.mean / 2);
    for (int64_t source = 0; source < experts; source++)
      while (at.load[source] > places)
        for (int64_t b = search(source); b != source; b = before[b]) move(mover[before[b] * wide + b], before[b], b);
    for (int64_t t = 0; t < tokens; t++) each(t, at.expert[t]);
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
    for (int64_t w = 0; w < bits.width; w++) bits.of(t)[w] = e / 64 == w ? uint64_t(1) << e % 64 : 0;
  });
}
}
