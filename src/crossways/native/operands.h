// What products are given: 32 left rows, panels of 32 right columns, and what to fetch meanwhile.
#pragma once
#include <algorithm>

#include "simd.h"

namespace crossways {

constexpr int SIDE = 32;             // rows and columns of one block, and summed values of one step
constexpr int BLOCK = SIDE * SIDE;   // floats of one block

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

template <class T>
struct Kind;
template <>
struct Kind<float> {
  static constexpr int per_word = 1;
  static constexpr int chunk = 8;  // steps after which the right operand would leave the first-level cache
};
template <>
struct Kind<bf16> {
  static constexpr int per_word = 2;
  static constexpr int chunk = 8;
};

// Where the two halves of 32 left rows lie: element (r, s) of half h is half[h][r * row + s / 32 * step + s % 32]. The
// matrix unit reads 32 values at once: where the rows end in between, their last values are at tail[32][32], with zeros.
template <class T>
struct Left {
  const T* half[2];
  int64_t row, step;
  const T* tail = nullptr;
};

// Which rows of the left operand that comes next to bring into the cache.
template <class T>
struct Ahead {
  const Left<T>* left;
  int64_t first, last;
  Ahead part(int64_t at, int64_t count) const {  // the share of `count` of 32 rows of the operand at work
    return {left, first + (last - first) * at / SIDE, first + (last - first) * (at + count) / SIDE};
  }
  void fetch(int64_t s) const {
    if (!left) return;
    for (int64_t r = first; r < last; r++) {
      auto* at = reinterpret_cast<const char*>(left->half[r / 16] + r % 16 * left->row + s * left->step);
      // GCC takes a function that only prefetches for one without effect and drops the call: hence assembly.
      for (size_t line = 0; line < SIDE * sizeof(T); line += 64) asm volatile("prefetcht1 %0" : : "m"(at[line]));
    }
  }
};

// Right panels: word (s, c) of panel p is words[p * panel + s / 32 * step + (s % 32 / per_word) * row + c].
struct Right {
  const uint32_t* words;
  int64_t row, step, panel;
  const float* thin = nullptr;  // the same for few columns, one after the other, as `thin_columns` makes them
};

}  // namespace crossways
