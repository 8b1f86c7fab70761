// Products with an expert's matrix the other way round, as gradients need them.
#pragma once
#include "rows.h"

namespace crossways {

// How many columns of a matrix are transposed at once, or how many rows: what comes of it stays in the second-level cache
// until it is used. The latter where all sums of a product are no more than SUMS.
constexpr int64_t COLUMNS = 128, ROWS = 128, STRETCH = 1 << 18, SUMS = 1 << 17;

// An expert's matrix, transposed, as the left operand of products that sum over its rows: `parts` times `depth` rows,
// `apart` values from one part to the next, of `count` columns.
template <class T>
struct Transposed {
  const T* matrix;
  int64_t stride, parts, apart, depth, count;
  T* packed;
  bool several;  // groups of pairs

  int64_t padded() const { return round_up(depth, SIDE); }

  // The product with `right`, block by block of 32 columns: `meanwhile(column, panel)` as its last sum begins, then
  // `done(column, c)`.
  template <class Meanwhile, class Done>
  void times(const Right& right, int64_t pairs, bool first, float* c, Meanwhile&& meanwhile, Done&& done) const {
    if (!several && round_up(pairs, SIDE) * round_up(count, SIDE) <= SUMS)
      by_rows(right, pairs, c, meanwhile, done);
    else
      by_columns(right, pairs, first, c, meanwhile, done);
  }

 private:
  // For few pairs, when reading the matrix takes longest: as it lies in memory, some rows at a time, all sums at once.
  template <class Meanwhile, class Done>
  void by_rows(const Right& right, int64_t pairs, float* c, Meanwhile&& meanwhile, Done&& done) const {
    const int64_t stretch = round_up(pairs, SIDE), some = rows_at_once();
    for (int64_t part = 0; part < parts; part++)
      for (int64_t row = 0; row < depth; row += some) {
        const T* from = matrix + part * apart + row * stride;
        const T* next = row + some < depth ? from + some * stride : part + 1 < parts ? matrix + (part + 1) * apart : nullptr;
        const int64_t rows = std::min(depth - row, some);
        Right these = right;
        these.words += (part * padded() + row) / SIDE * right.step;
        if (Kind<T>::per_word > 1) pack_columns(from, stride, rows, count, packed);
        for (int64_t at = 0; at < count; at += SIDE)
          some_rows(from, rows, at, these, pairs, c + at * stretch, part + row > 0, ahead(next, rows, at), [&](int64_t panel) {
            if (part == parts - 1 && row + some >= depth) meanwhile(at, panel);
          });
      }
    for (int64_t at = 0; at < count; at += SIDE) done(at, c + at * stretch);
  }
  int64_t rows_at_once() const {
    return Kind<T>::per_word > 1 ? ROWS : std::clamp<int64_t>(STRETCH / (stride * sizeof(T)) / SIDE * SIDE, SIDE, ROWS);
  }
  // A share of the rows that come next.
  Ahead ahead(const T* next, int64_t rows, int64_t at) const {
    if (!next || count < stride) return {};
    const int64_t bytes = rows * stride * sizeof(T), first = bytes * at / count, last = bytes * std::min(at + SIDE, count) / count;
    const char* piece = reinterpret_cast<const char*>(next) + first;
    return {piece, piece + (last - first) / 2, (last - first) / 2};
  }
  template <class Meanwhile>
  void some_rows(const float* from, int64_t rows, int64_t at, const Right& right, int64_t pairs, float* c, bool add,
                 const Ahead& ahead, Meanwhile&& meanwhile) const {
    const __mmask16 low = first16(count - at), high = first16(count - at - 16);
    for (int64_t r = 0; r < rows; r++) {
      store(packed + r * SIDE, load(from + at + r * stride, low));
      store(packed + r * SIDE + 16, load(from + at + r * stride + 16, high));
    }
    product<T>(Turned{packed}, right, pairs, rows, c, add, ahead, meanwhile);
  }
  template <class Meanwhile>
  void some_rows(const bf16*, int64_t rows, int64_t at, const Right& right, int64_t pairs, float* c, bool add,
                 const Ahead&, Meanwhile&& meanwhile) const {
    product<T>(packed_rows(packed, rows, at / SIDE), right, pairs, round_up(rows, SIDE), c, add, {}, meanwhile);
  }
  // Else some columns at a time, when the first group comes to them; kept for further groups.
  template <class Meanwhile, class Done>
  void by_columns(const Right& right, int64_t pairs, bool first, float* c, Meanwhile&& meanwhile, Done&& done) const {
    const int64_t all = parts * padded();
    for (int64_t at = 0; at < count; at += SIDE) {
      T* to = packed + (several ? at : at % COLUMNS) * all;
      for (int64_t part = 0; first && at % COLUMNS == 0 && part < parts; part++)
        pack_columns(matrix + part * apart + at, stride, depth, std::min(count - at, COLUMNS),
                     to + part * padded() * SIDE, all);
      product<T>(packed_rows(to, all, 0), right, pairs, all, c, false, {}, [&](int64_t panel) { meanwhile(at, panel); });
      done(at, c);
    }
  }
};

}  // namespace crossways
