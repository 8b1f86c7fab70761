// What the two kernels for few tokens share: the memory they work in, what each thread does, and the two steps. First
// all hidden values, then, after a barrier, all outputs: each is made by one thread, so the sum does not depend on their
// number.
//
// Legend: T tokens, P pairs sorted by expert, E experts, D model width, F expert width, H rows of the first matrix.
#pragma once
#include "activation.h"
#include "few_rows.h"
#include "problem.h"

namespace crossways {

constexpr int64_t BLOCK_OF_FEW = 16;  // hidden values, or outputs, that are one thread's

// In which part of [0, n) thread `me` of `team` begins, in whole blocks.
inline int64_t share_of_few(int64_t n, int64_t me, int64_t team) {
  const int64_t blocks = (n + BLOCK_OF_FEW - 1) / BLOCK_OF_FEW;
  return std::min(n, blocks * me / team * BLOCK_OF_FEW);
}

template <class T>
struct FewLayer {
  const Layer<T> l;
  const Problem& p = l.p;
  const int64_t D = l.D, F = l.F, H = l.H;
  std::vector<int64_t> busy;  // experts that have a token
  float* sum = nullptr;       // (T, D)

  explicit FewLayer(const Problem& problem) : l(problem) {
    for (int64_t e = 0; e < p.experts; e++)
      if (l.load(e)) busy.push_back(e);
  }

  // Call run(e, f0, f1) for the hidden values of each expert that are the share of thread `me` of `team`; cost(e) is the
  // time that one of them takes.
  template <class Cost, class Run>
  void for_share(int64_t me, int64_t team, Cost&& cost, Run&& run) const {
    const int64_t blocks = (F + BLOCK_OF_FEW - 1) / BLOCK_OF_FEW;
    int64_t total = 0, before = 0;
    for (int64_t e : busy) total += cost(e) * blocks;
    // A block belongs to the thread in whose share it begins.
    auto from = [&](int64_t e, int64_t thread) {
      const int64_t left = total * thread / team - before;
      return std::min(F, std::clamp<int64_t>((left + cost(e) - 1) / cost(e), 0, blocks) * BLOCK_OF_FEW);
    };
    for (int64_t e : busy) {
      const int64_t first = from(e, me), last = from(e, me + 1);
      if (first < last) run(e, first, last);
      before += cost(e) * blocks;
    }
  }

  // Call run(first pair, number of pairs) for all pairs of an expert. More than MANY read its weights again.
  template <class Run>
  void for_pairs(int64_t e, Run&& run) const {
    for (int64_t at = p.offsets[e]; at < p.offsets[e + 1]; at += MANY)
      run(at, std::min<int64_t>(MANY, p.offsets[e + 1] - at));
  }

  // Outputs [d0, d1) of all tokens: add(e, pair, n) adds those of an expert's pairs to `sum`.
  template <class Add>
  void put(int64_t d0, int64_t d1, Add&& add) const {
    for (int64_t t = 0; t < p.tokens; t++) std::fill(sum + t * D + d0, sum + t * D + d1, 0.0f);
    for (int64_t e : busy) for_pairs(e, [&](int64_t pair, int64_t n) { add(e, pair, n); });
    for (int64_t t = 0; t < p.tokens; t++)
      for (int64_t d = d0; d < d1; d += 16) {
        const __mmask16 mask = first16(d1 - d);
        store(static_cast<T*>(p.y) + t * D + d, load(sum + t * D + d, mask), mask);
      }
  }
};

}  // namespace crossways
