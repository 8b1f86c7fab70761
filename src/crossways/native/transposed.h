// Products with an expert's matrix the other way round, as gradients need them.
#pragma once
#include "rows.h"

namespace crossways {

// What is made of a matrix at once stays in the second-level cache until it is used: some of its rows, up to ROWS of
// them and STRETCH bytes, or COLUMNS columns. The former where all sums of a product are no more than SUMS.
constexpr int64_t COLUMNS = 128, ROWS = 256, STRETCH = 1 << 18, SUMS = 1 << 17;

// Rows that products read and write are this much longer than what they hold: at a multiple of 4 KB many of them would
// share a few sets of the first-level cache.
template <class T>
constexpr int64_t LONGER = 64 / sizeof(T);

// An expert's matrix as the right operand of products that sum over its rows: `parts` times `depth` rows, `apart`
// values from one part to the next, of `count` columns. Nothing is transposed for that: bfloat16 wants neighbouring rows
// in one word, float32 nothing at all but pieces of rows beside each other.
template <class T>
struct Transposed {
  const T* matrix;
  int64_t stride, parts, apart, depth, count;
  T* packed;
  bool several;  // groups of pairs

  int64_t padded() const { return round_up(depth, SIDE); }
  static int64_t sums(int64_t pairs) {  // that many pairs have at once
    return std::max(SUMS, round_up(pairs, SIDE) * COLUMNS) + round_up(pairs, SIDE) * LONGER<float>;
  }
  int64_t packed_size() const { return several ? parts * padded() * round_up(count, COLUMNS) : most(); }

  // `pairs` rows of `left`, `row` values from one to the next, each of parts * padded(), times this. As columns are
  // finished, done(first, how many, sums, values from one row of sums to the next). If it is not the `first` group of
  // several, what was made of the matrix for that is there.
  template <class Done>
  void times(const T* left, int64_t row, int64_t pairs, bool first, float* c, Done&& done) const {
    // All columns, some rows at a time: few pairs wait for memory, which is read fastest as it lies.
    const bool all = !several && round_up(pairs, SIDE) * round_up(count, SIDE) <= SUMS;
    const int64_t wide = all ? round_up(count, SIDE) : COLUMNS, tall = all ? rows_at_once() : padded();
    const Out out{c, wide + LONGER<float>};
    for (int64_t at = 0; at < count; at += wide) {
      const int64_t columns = std::min(count - at, wide);
      for (int64_t part = 0; part < parts; part++)
        for (int64_t r = 0; r < depth; r += tall) {
          const int64_t rows = std::min(depth - r, tall), panel = round_up(rows, SIDE);
          T* const to = packed + (several ? at * parts * padded() + part * padded() * wide : 0);
          if (first) pack(part * apart + r * stride + at, rows, columns, to);
          const Right right{reinterpret_cast<const uint32_t*>(to), SIDE, BLOCK / PER, panel * SIDE / PER};
          const T* next = all ? after(part, r, tall) : nullptr;
          for (int64_t i = 0; i < pairs; i += SIDE) {
            const T* from = left + i * row + part * padded() + r;
            product<T>(Left<T>{{from, from + 16 * row}, row, SIDE}, right, columns, panel, out.down(i), part + r > 0,
                       share(next, rows, i, pairs), {}, std::min<int64_t>(SIDE, pairs - i));
          }
        }
      done(at, columns, c, out.row);
    }
  }

 private:
  static constexpr int PER = Kind<T>::per_word;
  int64_t most() const {
    return std::max(STRETCH / int64_t(sizeof(T)) + SIDE * round_up(count, SIDE), padded() * COLUMNS);
  }
  int64_t rows_at_once() const {
    return std::clamp<int64_t>(STRETCH / int64_t(round_up(count, SIDE) * sizeof(T)) / SIDE * SIDE, SIDE, ROWS);
  }
  void pack(int64_t from, int64_t rows, int64_t columns, T* to) const {
    const T* these[SIDE];
    for (int64_t r = 0; r < rows; r += SIDE) {
      for (int64_t i = 0; i < SIDE; i++) these[i] = r + i < rows ? matrix + from + (r + i) * stride : nullptr;
      pair_rows(these, columns, reinterpret_cast<uint32_t*>(to) + r * SIDE / PER, round_up(rows, SIDE) * SIDE / PER);
    }
  }
  // The rows that come after `tall` rows at `r`, if they lie there in one piece.
  const T* after(int64_t part, int64_t r, int64_t tall) const {
    if (count < stride) return nullptr;
    if (r + tall < depth) return matrix + part * apart + (r + tall) * stride;
    return part + 1 < parts ? matrix + (part + 1) * apart : nullptr;
  }
  // The share of pairs from `i` on in fetching as many rows at `next`.
  Ahead share(const T* next, int64_t rows, int64_t i, int64_t pairs) const {
    if (!next) return {};
    const int64_t bytes = rows * stride * sizeof(T), first = bytes * i / pairs;
    const int64_t half = (bytes * std::min(i + SIDE, pairs) / pairs - first) / 2;
    const char* piece = reinterpret_cast<const char*>(next) + first;
    return {piece, piece + half, half};
  }
};

}  // namespace crossways
