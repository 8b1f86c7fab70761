// Gradients of an expert's matrices: products that sum over its pairs.
#pragma once
#include "rows.h"

namespace crossways {

// Left rows of bfloat16 lie this far apart from panel to panel, beyond their number, for the same reason as LONGER.
template <class T>
constexpr int64_t GAP = Kind<T>::per_word == 1 ? 0 : SIDE;

// How many columns of a weight gradient are written at once.
constexpr int64_t WRITTEN = 64;

// Write a block of a weight gradient as far as the matrix goes.
template <class T>
void put_block(const float* c, T* matrix, int64_t stride, int64_t rows, int64_t columns) {
  for (int i = 0; i < std::min<int64_t>(rows, SIDE); i++)
    put_row(matrix + i * stride, load(c + i * SIDE), load(c + i * SIDE + 16), columns);
}

// Where rows of a weight gradient, and columns, go.
template <class T>
struct Place {
  T* at;
  int64_t stride, rows, columns;
  // In float32 blocks go there straight from the registers, past the caches, if all of it exists and begins a line.
  bool straight(int64_t all_rows, int64_t all_columns) const {
    return Kind<T>::per_word == 1 && rows >= all_rows && columns >= all_columns && stride % 16 == 0 &&
           reinterpret_cast<uintptr_t>(at) % 64 == 0;
  }
};

// A weight gradient: for every 32 of `rows` rows, left rows at `left` (whose panels hold `all` rows) times `right`.
// Experts of several groups add up in `total`; the last group writes to `place(row, column)`, a few blocks at once
// while they are in the first-level cache.
template <class T, class PlaceOf>
void weight_gradient(const T* left, int64_t all, int64_t rows, const Right& right, int64_t columns, int64_t pairs,
                     float* c, float* total, bool first, bool last, PlaceOf&& place) {
  for (int64_t r = 0; r < rows; r += SIDE) {
    const T* at = left + r * SIDE;
    const Left<T> these{{at, at + 16 * SIDE}, SIDE, (all + GAP<T>)*SIDE};
    for (int64_t column = 0; column < columns; column += WRITTEN) {
      const Right some{right.words + column / SIDE * right.panel, right.row, right.step, right.panel};
      const int64_t count = std::min(columns - column, WRITTEN);
      const Place<T> to = place(r, column);
      if (!total && pairs <= Kind<T>::chunk * SIDE && to.straight(SIDE, count)) {
        product<T>(these, some, count, pairs, Out(reinterpret_cast<float*>(to.at), to.stride, true));
        continue;
      }
      float* sums = total ? total + r * columns + column * SIDE : c;
      product<T>(these, some, count, pairs, Out(sums), !first);
      for (int64_t i = 0; last && i < count; i += SIDE)
        put_block(sums + i * SIDE, to.at + i, to.stride, to.rows, to.columns - i);
    }
  }
}

}  // namespace crossways
