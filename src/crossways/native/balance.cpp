// BASE's linear assignment problem: one expert for each token, at most C tokens for each expert, greatest total gain.
//
// A transportation problem with few destinations, solved exactly by successive shortest paths (Ahuja, Magnanti and
// Orlin 1993, section 9.7). Every token begins with its best expert; then each token too many is pushed, along the
// cheapest chain of moves from expert to expert, to one that has room. Prices keep all costs non-negative, so that
// Dijkstra's algorithm finds the chain among E nodes.
//
// Legend: N tokens, E experts, C places per expert.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double FAR = std::numeric_limits<double>::infinity();

struct Transport {
  int64_t n, experts, places, wide;  // wide: E in whole vectors of 8
  std::vector<double> gain;          // (N, wide), rows padded with -infinity
  std::vector<std::vector<int64_t>> members;
  std::vector<double> cost;    // (E, wide): the least loss of moving one token of a to b
  std::vector<int64_t> mover;  // (E, wide): which token that is
  std::vector<double> price, distance, open;  // (wide): open is the distance of who has not been visited
  std::vector<int64_t> before;                // on the cheapest chain
  double room_price = 0;                      // price of the node behind all experts that have room

  Transport(const double* from, int64_t n_, int64_t experts_, int64_t places_)
      : n(n_), experts(experts_), places(places_), wide((experts_ + 7) / 8 * 8), gain(n * wide, -FAR), members(experts),
        cost(experts * wide, FAR), mover(experts * wide, -1), price(wide, 0), distance(wide), open(wide), before(wide) {
    for (int64_t t = 0; t < n; t++) {
      const double* row = from + t * experts;
      std::copy_n(row, experts, gain.begin() + t * wide);
      members[std::max_element(row, row + experts) - row].push_back(t);
    }
    for (int64_t a = 0; a < experts; a++)
      for (int64_t t : members[a]) consider(a, t);
  }

  // Whether t is the token that a loses least by giving away, to every other expert.
  void consider(int64_t a, int64_t t) {
    const double* row = &gain[t * wide];
    double* least = &cost[a * wide];
    int64_t* who = &mover[a * wide];
    const __m512d here = _mm512_set1_pd(row[a]);
    const __m512i me = _mm512_set1_epi64(t);
    for (int64_t b = 0; b < wide; b += 8) {
      const __m512d loss = _mm512_sub_pd(here, _mm512_loadu_pd(row + b));
      const __mmask8 better = _mm512_cmp_pd_mask(loss, _mm512_loadu_pd(least + b), _CMP_LT_OQ);
      _mm512_mask_storeu_pd(least + b, better, loss);
      _mm512_mask_storeu_epi64(who + b, better, me);
    }
    least[a] = FAR;
  }

  void move(int64_t t, int64_t a, int64_t b) {
    members[a].erase(std::find(members[a].begin(), members[a].end(), t));
    std::fill_n(cost.begin() + a * wide, wide, FAR);
    for (int64_t one : members[a]) consider(a, one);
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
    double end = FAR;
    int64_t last = -1;
    for (;;) {
      const int64_t a = nearest();
      if (a < 0 || distance[a] >= end) break;
      open[a] = FAR;
      if (has_room(a) && distance[a] + price[a] - room_price < end) {
        end = distance[a] + price[a] - room_price;
        last = a;
      }
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
    for (int64_t e = 0; e < experts; e++) price[e] += std::min(distance[e], end);
    room_price += end;
    return last;
  }

  void solve(int64_t* chosen) {
    for (int64_t source = 0; source < experts; source++)
      while (int64_t(members[source].size()) > places)
        for (int64_t b = search(source); b != source; b = before[b]) move(mover[before[b] * wide + b], before[b], b);
    for (int64_t e = 0; e < experts; e++)
      for (int64_t t : members[e]) chosen[t] = e;
  }
};

}  // namespace

extern "C" {

// chosen[t] = the expert of token t, group by group: tokens starts[g] to starts[g + 1] - 1 share the experts, each of
// which takes at most their number / E, rounded up. gain is finite, (N, E).
void crossways_balanced(const double* gain, const int64_t* starts, int64_t groups, int64_t experts, int64_t* chosen,
                        int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t g = 0; g < groups; g++) {
    const int64_t n = starts[g + 1] - starts[g], places = (n + experts - 1) / experts;
    Transport(gain + starts[g] * experts, n, experts, places).solve(chosen + starts[g]);
  }
}
}
