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
  static constexpr int blocks = 4;  // into which a block's rows are split
};
template <>
struct Kind<bf16> {
  static constexpr int per_word = 2;
  static constexpr int chunk = 8;
  static constexpr int blocks = 1;
};

// Where the two halves of 32 left rows lie: element (r, s) of half h is half[h][r * row + s / 32 * step + s % 32]. The
// matrix unit reads 32 values at once: where the rows end in between, their last values are at tail[32][32], with zeros.
template <class T>
struct Left {
  const T* half[2];
  int64_t row, step;
  const T* tail = nullptr;
};

// Where the blocks of a product go: element (r, c) of panel p is at[p * panel + r * row + c]. `past` the caches, or not.
struct Out {
  float* at;
  int64_t row = SIDE, panel = BLOCK;
  bool past = false;
  Out(float* c) : at(c) {}
  Out(float* matrix, int64_t stride, bool past = false) : at(matrix), row(stride), panel(SIDE), past(past) {}
  Out down(int64_t rows) const {
    Out out = *this;
    out.at += rows * row;
    return out;
  }
};

// What is needed next and lies in memory in one piece or two: brought into the cache a little with every step.
//
// In the order of memory, not row beside row: only then does the processor run ahead on its own, and a core cannot wait
// for enough lines at once without that. Of several places at once it runs ahead better than of one: each piece is
// fetched as PARTS of it side by side.
struct Ahead {
  static constexpr int PARTS = 2;
  const char* at[2 * PARTS] = {};
  int64_t left = 0, every = 0;  // lines of each part that are to come; of each part at every step
  Ahead() = default;
  // Both pieces are of `bytes`; the second may be null.
  Ahead(const void* first, const void* second, int64_t bytes) : left((bytes + 64 * PARTS - 1) / (64 * PARTS)) {
    for (int i = 0; i < PARTS; i++) {
      at[i] = static_cast<const char*>(first) + i * left * 64;
      at[PARTS + i] = second ? static_cast<const char*>(second) + i * left * 64 : nullptr;
    }
  }
  void spread(int64_t steps) { every = (left + steps - 1) / steps; }
  void fetch() {
    // GCC takes a function that only prefetches for one without effect and drops the call: hence assembly.
    for (int64_t i = std::min(every, left); i > 0; i--, left--)
      for (auto& part : at)
        if (part) {
          asm volatile("prefetcht1 %0" : : "m"(*part));
          part += 64;
        }
  }
};

// What lies in memory in one piece and is needed soon; nothing, if there is no such piece.
struct Piece {
  const void* at = nullptr;
  int64_t bytes = 0;
  // What the i-th of n products, until it is needed, brings into the cache of it.
  Ahead share(int64_t i, int64_t n) const {
    if (!at) return {};
    const int64_t first = bytes * i / n, half = (bytes * (i + 1) / n - first) / 2;
    const char* from = static_cast<const char*>(at) + first;
    return {from, from + half, half};
  }
};

// Right panels: word (s, c) of panel p is words[p * panel + s / 32 * step + (s % 32 / per_word) * row + c].
struct Right {
  const uint32_t* words;
  int64_t row, step, panel;
  const float* thin = nullptr;  // the same for few columns, one after the other, as `thin_columns` makes them
};

}  // namespace crossways
