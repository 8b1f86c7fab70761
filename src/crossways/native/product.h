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

// out (panels of 32 x 32) = left (32 x depth) times panel p, or added to what it holds, for `columns` columns of panels
// and the first `rows` of the 32 rows. Of a last panel of at most 16 columns the right half of the block is left as it
// is. Meanwhile it fetches what is `ahead`. `meanwhile(p)` is called as panel p begins: for fetching what is to be done
// with its block.
//
// Nothing else is done between the blocks: it would drive the left rows out of the first-level cache.
template <class T, class Meanwhile = Nothing>
inline void product(const Left<T>& left, const Right& right, int64_t columns, int64_t depth, Out out, bool add = false,
                    Ahead ahead = {}, Meanwhile&& meanwhile = {}, int64_t rows = SIDE) {
  constexpr int64_t chunk = Kind<T>::chunk * SIDE;
  const int64_t thin = thin_of(left, right, columns), wide = columns - thin, panels = (wide + SIDE - 1) / SIDE;
  const Out to = out;
  ahead.spread((Kind<T>::blocks * panels + (thin ? Kind<T>::blocks : 0)) * ((depth + SIDE - 1) / SIDE));
  for (int64_t from = 0; from < depth; from += chunk) {
    const int64_t until = std::min(depth, from + chunk);
    for (int64_t p = 0; p < panels; p++) {
      if (from == 0) meanwhile(p);
      const uint32_t* words = right.words + p * right.panel;
      out.at = to.at + p * out.panel;
      if (wide - p * SIDE > 16)
        block<true>(left, words, right, from, until, out, add || from > 0, ahead, rows);
      else
        block<false>(left, words, right, from, until, out, add || from > 0, ahead, rows);
    }
  }
  if (!thin) return;
  if (wide % SIDE == 0) meanwhile(panels);
  out.at = to.at + wide / SIDE * out.panel + wide % SIDE;
  thin_block(left, right.thin, thin, depth, out, ahead);
}

}  // namespace crossways
