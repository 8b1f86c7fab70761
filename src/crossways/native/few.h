// What a call for few tokens works on, and how its work is shared out.
//
// Legend: T tokens, P pairs sorted by expert, D model width, F expert width, H rows of the first matrix.
#pragma once
#include "activation.h"
#include "problem.h"

namespace crossways {

constexpr int ROWS = 16;  // of weights that make a vector of sums
constexpr int MANY = 32;  // pairs of one expert that are worked on at once, at most

struct Few {
  const Problem& p;
  const int64_t D = p.width, F = p.expert_width, H = p.gated ? 2 * F : F, blocks = (F + ROWS - 1) / ROWS;
  std::vector<int64_t> busy;  // experts that have a token
  float* sum;                 // (T, D)

  // Reserves `bytes` of working memory beside its own.
  Few(const Problem& problem, size_t bytes) : p(problem) {
    for (int64_t e = 0; e < p.experts; e++)
      if (load(e)) busy.push_back(e);
    scratch.reserve(p.tokens * D * sizeof(float) + bytes + 4096);
    sum = scratch.take<float>(p.tokens * D);
  }
  int64_t load(int64_t e) const { return p.offsets[e + 1] - p.offsets[e]; }
  // Time that a block of hidden values takes: that of reading its weights, unless many tokens are multiplied by them.
  int64_t cost(int64_t e) const { return std::max<int64_t>(load(e), 20); }

  // Call run(e, first, last) for the blocks of each expert that are the share of thread `me` of `team`.
  template <class Run>
  void for_share(int64_t me, int64_t team, Run&& run) const {
    int64_t total = 0, before = 0;
    for (int64_t e : busy) total += cost(e) * blocks;
    // A block belongs to the thread in whose share it begins.
    auto from = [&](int64_t e, int64_t thread) {
      const int64_t left = total * thread / team - before;
      return std::clamp<int64_t>((left + cost(e) - 1) / cost(e), 0, blocks);
    };
    for (int64_t e : busy) {
      const int64_t first = from(e, me), last = from(e, me + 1);
      if (first < last) run(e, first, last);
      before += cost(e) * blocks;
    }
  }

  // Call run(first pair, number of pairs) for all pairs of an expert.
  template <class Run>
  void for_pairs(int64_t e, Run&& run) const {
    for (int64_t at = p.offsets[e]; at < p.offsets[e + 1]; at += MANY)
      run(at, std::min<int64_t>(MANY, p.offsets[e + 1] - at));
  }

  // Columns [d0, d1) of `sum`: nothing yet; and written to y.
  void clear(int64_t d0, int64_t d1) const {
    for (int64_t t = 0; t < p.tokens; t++) std::fill(sum + t * D + d0, sum + t * D + d1, 0.0f);
  }
  template <class T>
  void write(int64_t d0, int64_t d1) const {
    for (int64_t t = 0; t < p.tokens; t++)
      for (int64_t d = d0; d < d1; d += 16)
        store(static_cast<T*>(p.y) + t * D + d, load_sum(t, d, d1), first16(d1 - d));
  }

 private:
  Vec load_sum(int64_t t, int64_t d, int64_t d1) const { return crossways::load(sum + t * D + d, first16(d1 - d)); }
};

}  // namespace crossways
