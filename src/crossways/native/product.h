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

// Left (32 x depth) times every panel of `columns` columns, or added to what c holds. `done(p, block)` is called when
// the block of panel p is complete and still near; of a last panel of at most 16 columns the right half is left as it
// is. c has room for all blocks, and with `keep` holds them all afterwards. While it computes it fetches the rows of `next`, if given; but for few columns memory
// is the limit, and the processor's own foresight uses it better.
template <class T, class Done>
inline void product(const Left<T>& left, const Right& right, int64_t columns, int64_t depth, float* c, bool add,
                    bool keep, const Left<T>* next, Done&& done) {
  if (right.thin) {
    thin_product(left, right.thin, columns, depth, c);
    return done(0, c);
  }
  constexpr int64_t chunk = Kind<T>::chunk * SIDE;
  const int64_t panels = (columns + SIDE - 1) / SIDE;
  for (int64_t from = 0; from < depth; from += chunk) {
    const int64_t to = std::min(depth, from + chunk);
    for (int64_t p = 0; p < panels; p++) {
      const uint32_t* words = right.words + p * right.panel;
      const Ahead<T> ahead{columns > SIDE ? next : nullptr, SIDE * p / panels, SIDE * (p + 1) / panels};
      float* at = keep || depth > chunk ? c + p * BLOCK : c;
      if (columns - p * SIDE > 16)
        block<true>(left, words, right, from, to, at, add || from > 0, ahead);
      else
        block<false>(left, words, right, from, to, at, add || from > 0, ahead);
      if (to == depth) done(p, at);
    }
  }
}

}  // namespace crossways
