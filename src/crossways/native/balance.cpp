// BASE's linear assignment problem: one expert for each token, at most C tokens for each expert, greatest total gain.
//
// A transportation problem with few destinations, solved exactly by successive shortest paths (Ahuja, Magnanti and
// Orlin 1993, section 9.7). Every token begins with its best expert; then each token too many is pushed, along the
// cheapest chain of moves from expert to expert, to one that has room. Prices keep all costs non-negative, so that
// Dijkstra's algorithm finds the chain among E nodes.
//
// Legend: N tokens, E experts, C places per expert.
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

constexpr double FAR = std::numeric_limits<double>::infinity();

struct Transport {
  const double* gain;
  int64_t n, experts, places;
  std::vector<std::vector<int64_t>> members;
  std::vector<double> cost;     // (E, E): the least loss of moving one token of a to b
  std::vector<int64_t> mover;   // (E, E): which token that is
  std::vector<double> price, distance;
  std::vector<int64_t> before;  // on the cheapest chain
  std::vector<char> done;
  double room_price = 0;        // price of the node behind all experts that have room

  Transport(const double* gain_, int64_t n_, int64_t experts_, int64_t places_)
      : gain(gain_), n(n_), experts(experts_), places(places_), members(experts_), cost(experts_ * experts_, FAR),
        mover(experts_ * experts_, -1), price(experts_, 0), distance(experts_), before(experts_), done(experts_) {
    for (int64_t t = 0; t < n; t++) {
      const double* row = gain + t * experts;
      members[std::max_element(row, row + experts) - row].push_back(t);
    }
    for (int64_t a = 0; a < experts; a++) reprice(a);
  }

  // The least loss of moving one of a's tokens, to every other expert.
  void reprice(int64_t a) {
    double* least = cost.data() + a * experts;
    int64_t* who = mover.data() + a * experts;
    std::fill_n(least, experts, FAR);
    for (int64_t t : members[a]) {
      const double* row = gain + t * experts;
      const double here = row[a];
      for (int64_t b = 0; b < experts; b++) {
        const bool better = here - row[b] < least[b];
        least[b] = better ? here - row[b] : least[b];
        who[b] = better ? t : who[b];
      }
    }
    least[a] = FAR;
  }

  bool has_room(int64_t e) const { return int64_t(members[e].size()) < places; }

  // The last expert of the cheapest chain from `source` to one that has room.
  int64_t search(int64_t source) {
    std::fill(distance.begin(), distance.end(), FAR);
    std::fill(done.begin(), done.end(), 0);
    distance[source] = 0;
    double end = FAR;
    int64_t last = -1;
    for (;;) {
      int64_t a = -1;
      for (int64_t e = 0; e < experts; e++)
        if (!done[e] && (a < 0 || distance[e] < distance[a])) a = e;
      if (a < 0 || distance[a] >= end) break;
      done[a] = 1;
      if (has_room(a) && distance[a] + price[a] - room_price < end) {
        end = distance[a] + price[a] - room_price;
        last = a;
      }
      const double so_far = distance[a] + price[a];
      const double* loss = cost.data() + a * experts;
      for (int64_t b = 0; b < experts; b++) {
        // Rounding may leave a cost just below zero.
        const double there = std::max(so_far + loss[b] - price[b], distance[a]);
        const bool nearer = !done[b] && there < distance[b];
        distance[b] = nearer ? there : distance[b];
        before[b] = nearer ? a : before[b];
      }
    }
    for (int64_t e = 0; e < experts; e++) price[e] += std::min(distance[e], end);
    room_price += end;
    return last;
  }

  void solve(int64_t* chosen) {
    for (int64_t source = 0; source < experts; source++)
      while (int64_t(members[source].size()) > places) {
        std::vector<int64_t> chain{search(source)};
        while (chain.back() != source) chain.push_back(before[chain.back()]);
        for (size_t i = chain.size() - 1; i > 0; i--) {
          const int64_t a = chain[i], b = chain[i - 1], t = mover[a * experts + b];
          members[a].erase(std::find(members[a].begin(), members[a].end(), t));
          members[b].push_back(t);
        }
        for (int64_t e : chain) reprice(e);
      }
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
