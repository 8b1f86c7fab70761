// Products with an expert's matrix the other way round, as gradients need them.
#pragma once
#include "rows.h"

namespace crossways {

// What is made of a matrix at once stays in the second-level cache until it is used: COLUMNS columns; or, where all sums
// of a product are no more than SUMS, some rows, up to ROWS and STRETCH bytes. Of FEW pairs, which wait for memory, these
// are fewer, down to LEAST, so that those that come next, and more sums, have room beside them.
constexpr int64_t COLUMNS = 128, LEAST = 64, ROWS = 256, STRETCH = 1 << 18, SUMS = 1 << 17, FEW = 96;

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
    return std::max(2 * SUMS, round_up(pairs, SIDE) * COLUMNS) + round_up(pairs, SIDE) * LONGER<float>;
  }
  int64_t packed_size() const { return several ? parts * padded() * round_up(count, COLUMNS) : most(); }

  // What `times` reads first, if it lies in one piece.
  Piece begin(int64_t pairs) const {
    return all_columns(pairs) && count == stride ? rows_from(matrix, std::min(depth, rows_at_once(pairs))) : Piece{};
  }

  // `pairs` rows of `left`, `row` values from one to the next, each of parts * padded(), times this. As columns are
  // finished, done(first, how many, sums, values from one row of sums to the next). If it is not the `first` group of
  // several, what was made of the matrix for that is there. Meanwhile it fetches what comes `then`.
  template <class Done>
  void times(const T* left, int64_t row, int64_t pairs, bool first, float* c, Piece then, Done&& done) const {
    const bool all = all_columns(pairs);
    const int64_t wide = all ? round_up(count, SIDE) : COLUMNS, tall = all ? rows_at_once(pairs) : padded();
    const Out out{c, wide + LONGER<float>};
    for (int64_t at = 0; at < count; at += wide) {
      const int64_t columns = std::min(count - at, wide);
      for (int64_t part = 0; part < parts; part++)
        for (int64_t r = 0; r < depth; r += tall) {
          const int64_t rows = std::min(depth - r, tall), panel = round_up(rows, SIDE);
          T* const to = packed + (several ? at * parts * padded() + part * padded() * wide : 0);
          if (first) pack(part * apart + r * stride + at, rows, columns, to);
          const Right right{reinterpret_cast<const uint32_t*>(to), SIDE, BLOCK / PER, panel * SIDE / PER};
          const Piece next = all ? after(part, r, tall, then) : Piece{};
          for (int64_t i = 0; i < pairs; i += SIDE) {
            const T* from = left + i * row + part * padded() + r;
            product<T>(Left<T>{{from, from + 16 * row}, row, SIDE}, right, columns, panel, out.down(i), part + r > 0,
                       next.share(i / SIDE, (pairs + SIDE - 1) / SIDE), {}, std::min<int64_t>(SIDE, pairs - i));
          }
        }
      done(at, columns, c, out.row);
    }
  }

 private:
  static constexpr int PER = Kind<T>::per_word;
  int64_t most() const {
    const int64_t rows = std::max(rows_at_once(FEW), rows_at_once(FEW + 1));
    return std::max(rows * round_up(count, SIDE), padded() * COLUMNS);
  }
  // All columns, some rows at a time: few pairs wait for memory, which is read fastest as it lies.
  bool all_columns(int64_t pairs) const {
    return !several && round_up(pairs, SIDE) * round_up(count, SIDE) <= (pairs <= FEW ? 2 * SUMS : SUMS);
  }
  int64_t rows_at_once(int64_t pairs) const {
    const int64_t bytes = pairs <= FEW ? STRETCH / 4 : STRETCH, least = pairs <= FEW ? LEAST : SIDE;
    return std::clamp<int64_t>(bytes / int64_t(round_up(count, SIDE) * sizeof(T)) / SIDE * SIDE, least, ROWS);
  }
  void pack(int64_t from, int64_t rows, int64_t columns, T* to) const {
    const T* these[SIDE];
    for (int64_t r = 0; r < rows; r += SIDE) {
      for (int64_t i = 0; i < SIDE; i++) these[i] = r + i < rows ? matrix + from + (r + i) * stride : nullptr;
      pair_rows(these, columns, reinterpret_cast<uint32_t*>(to) + r * SIDE / PER, round_up(rows, SIDE) * SIDE / PER);
    }
  }
  Piece rows_from(const T* at, int64_t rows) const { return {at, int64_t(rows * stride * sizeof(T))}; }
  // The rows that come after `tall` rows at `r`, if they lie there in one piece.
  Piece after(int64_t part, int64_t r, int64_t tall, const Piece& then) const {
    const bool more = r + tall < depth;
    if (!more && part + 1 == parts) return then;
    if (count < stride) return {};
    const T* at = matrix + (more ? part * apart + (r + tall) * stride : (part + 1) * apart);
    return rows_from(at, std::min(more ? depth - r - tall : depth, tall));
  }
};

}  // namespace crossways
