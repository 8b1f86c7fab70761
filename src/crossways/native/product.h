// Products of 32 rows by panels of 32 columns, accumulated in float32.
//
// The left operand is read where it lies, the right one is a panel of words: [k][32]. bfloat16 runs on the matrix
// unit (AMX), 32 summed values a step; float32 on vectors of 16, in steps of 32 likewise, so that both have the same
// shape from outside.
#pragma once
#include "matrix_unit.h"
#include "thin.h"
#include "vectors.h"

namespace crossways {

struct Nothing {
  void operator()(int64_t) const {}
};

// c[p] (32 x 32 each) = left (32 x depth) times panel p, or added to what c holds, for `columns` columns of panels.
// Of a last panel of at most 16 columns the right half of c is left as it is. While it computes it fetches the rows of
// `next`, if given; but for few columns memory is the limit, and the processor's own foresight uses it better.
// `meanwhile(p)` is called as panel p begins: for fetching what is to be done with its block.
//
// Nothing else is done between the blocks: it would drive the left rows out of the first-level cache.
template <class T, class Meanwhile = Nothing>
inline void product(const Left<T>& left, const Right& right, int64_t columns, int64_t depth, float* c,
                    bool add = false, const Left<T>* next = nullptr, Meanwhile&& meanwhile = {}) {
  if (right.thin) return thin_product(left, right.thin, columns, depth, c);
  constexpr int64_t chunk = Kind<T>::chunk * SIDE;
  const int64_t panels = (columns + SIDE - 1) / SIDE;
  for (int64_t from = 0; from < depth; from += chunk) {
    const int64_t to = std::min(depth, from + chunk);
    for (int64_t p = 0; p < panels; p++) {
      if (from == 0) meanwhile(p);
      const uint32_t* words = right.words + p * right.panel;
      const Ahead<T> ahead{columns > SIDE ? next : nullptr, SIDE * p / panels, SIDE * (p + 1) / panels};
      if (columns - p * SIDE > 16)
        block<true>(left, words, right, from, to, c + p * BLOCK, add || from > 0, ahead);
      else
        block<false>(left, words, right, from, to, c + p * BLOCK, add || from > 0, ahead);
    }
  }
}

}  // namespace crossways
