// Gradients of an expert's matrices: products that sum over its pairs.
#pragma once
#include "rows.h"

namespace crossways {

// Left rows of bfloat16 lie this far apart from panel to panel, beyond their number, for the same reason as LONGER.
template <class T>
constexpr int64_t GAP = Kind<T>::per_word == 1 ? 0 : SIDE;

// How many columns of a weight gradient are written at once.
constexpr int64_t WRITTEN = 64;
// Bytes of the right operand that stay in the first-level cache.
constexpr int64_t NEAR = 24 << 10;

// Where rows of a weight gradient, and columns, go.
template <class T>
struct Place {
  T* at;
  int64_t stride, rows, columns;
  bool lines() const { return stride * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(at) % 64 == 0; }
  // In float32 blocks go there straight from the registers, past the caches, if all of it exists and begins a line.
  bool straight(int64_t all_rows, int64_t all_columns) const {
    return Kind<T>::per_word == 1 && rows >= all_rows && columns >= all_columns && lines();
  }
};

// Rows that begin anywhere in a line, all their columns one after the other: written here first, and then past the
// caches line by line. Written piece by piece where they belong, every line would be read first.
template <class T>
struct Stage {
  T* memory;  // for 32 rows and a line more
  Place<T> to = {};
  bool used = false;
  static int64_t size(int64_t columns) { return SIDE * columns + 64 / sizeof(T); }
  // Rows that begin at `place`, of which `columns` are going to be written.
  void begin(const Place<T>& place, int64_t columns) {
    to = place;
    used = !place.lines() && place.stride == place.columns && place.columns <= columns;
  }
  // As far into the line as where it goes.
  T* at() const { return memory + reinterpret_cast<uintptr_t>(to.at) % 64 / sizeof(T); }
  void end() const {
    if (!used) return;
    const char* from = reinterpret_cast<const char*>(at());
    char *out = reinterpret_cast<char*>(to.at), *last = out + std::min<int64_t>(to.rows, SIDE) * to.stride * sizeof(T);
    auto copy = [&](int64_t bytes) {  // up to the end of a line, or of everything
      std::memcpy(out, from, bytes);
      out += bytes, from += bytes;
    };
    copy(std::min<int64_t>(-reinterpret_cast<uintptr_t>(out) % 64, last - out));
    for (; last - out >= 64; out += 64, from += 64)
      _mm512_stream_si512(reinterpret_cast<Words*>(out), _mm512_load_si512(from));
    copy(last - out);
  }
};

// Write a block of a weight gradient as far as the matrix goes: its i-th column on is `place`'s.
template <class T>
void put_block(const float* c, const Place<T>& place, int64_t i, const Stage<T>& stage) {
  for (int r = 0; r < std::min<int64_t>(place.rows, SIDE); r++) {
    const Vec a = load(c + r * SIDE), b = load(c + r * SIDE + 16);
    if (stage.used)
      keep_row(stage.at() + (place.at - stage.to.at) + r * place.stride + i, a, b, place.columns - i);
    else
      put_row(place.at + r * place.stride + i, a, b, place.columns - i);
  }
}

// How many columns all rows are multiplied by before the next ones: in bfloat16, of few pairs, those that stay in the
// first-level cache meanwhile, if rows of them are whole lines.
template <class T>
int64_t columns_at_once(int64_t pairs, int64_t columns, const Place<T>& place) {
  const int64_t fit = NEAR / int64_t(round_up(pairs, SIDE) * sizeof(T)) / WRITTEN * WRITTEN;
  return Kind<T>::per_word > 1 && fit && place.lines() ? fit : columns;
}

// A weight gradient: for every 32 of `rows` rows, left rows at `left` (whose panels hold `all` rows) times `right`.
// Experts of several groups add up in `total`; the last group writes to `place(row, column)`, a few blocks at once
// while they are in the first-level cache. Meanwhile it fetches what comes `then`.
template <class T, class PlaceOf>
void weight_gradient(const T* left, int64_t all, int64_t rows, const Right& right, int64_t columns, int64_t pairs,
                     float* c, float* total, bool first, bool last, Stage<T> stage, Piece then, PlaceOf&& place) {
  const int64_t wide = columns_at_once(pairs, columns, place(0, 0));
  const int64_t products = (columns + WRITTEN - 1) / WRITTEN * ((rows + SIDE - 1) / SIDE);
  int64_t done = 0;
  for (int64_t begin = 0; begin < columns; begin += wide)
    for (int64_t r = 0; r < rows; r += SIDE) {
      const T* at = left + r * SIDE;
      const Left<T> these{{at, at + 16 * SIDE}, SIDE, (all + GAP<T>)*SIDE};
      if (last) stage.begin(place(r, begin), columns);
      for (int64_t column = begin; column < std::min(columns, begin + wide); column += WRITTEN) {
        const Right some{right.words + column / SIDE * right.panel, right.row, right.step, right.panel};
        const int64_t count = std::min(columns - column, WRITTEN);
        const Place<T> to = place(r, column);
        const Ahead ahead = then.share(done++, products);
        if (!total && pairs <= Kind<T>::chunk * SIDE && to.straight(SIDE, count)) {
          product<T>(these, some, count, pairs, Out(reinterpret_cast<float*>(to.at), to.stride, true), false, ahead);
          continue;
        }
        float* sums = total ? total + r * columns + column * SIDE : c;
        product<T>(these, some, count, pairs, Out(sums), !first, ahead);
        for (int64_t i = 0; last && i < count; i += SIDE) put_block(sums + i * SIDE, to, i, stage);
      }
      if (last) stage.end();
    }
}

}  // namespace crossways
