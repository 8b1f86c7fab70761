// One thread's forward pass through some hidden rows of one expert.
#pragma once
#include "activation.h"
#include "problem.h"

namespace crossways {

// Two neighbouring rows of a right panel.
inline void put_pair(float* panel, int64_t row, int c, Vec low, Vec high) {
  _mm512_storeu_ps(panel + row * SIDE + 16 * c, low);
  _mm512_storeu_ps(panel + (row + 1) * SIDE + 16 * c, high);
}
inline void put_pair(bf16* panel, int64_t row, int c, Vec low, Vec high) {
  _mm512_storeu_si512(reinterpret_cast<uint32_t*>(panel) + row / 2 * SIDE + 16 * c, pair_words(low, high));
}

// Right panels that hold `depth` summed values for each of their columns.
template <class T>
Right panels_of(const T* words, int64_t depth) {
  constexpr int per = Kind<T>::per_word;
  return {reinterpret_cast<const uint32_t*>(words), SIDE, BLOCK / per, round_up(depth, SIDE) * SIDE / per};
}

// The same with the last columns laid out as thin ones, if they are few; `thin` is the space for it.
template <class T>
Right panels_for(const T* words, int64_t depth, int64_t columns, float* thin) {
  Right right = panels_of(words, depth);
  const int64_t wide = columns - thin_of(columns);
  if (Kind<T>::per_word > 1 || wide == columns) return right;
  const auto* panel = reinterpret_cast<const float*>(right.words + wide / SIDE * right.panel);
  thin_columns(panel, wide % SIDE, depth, thin);
  right.thin = thin;
  return right;
}

// The first product's block to a hidden block: gated, 16 gate rows over 16 value rows; plain, 32 rows.
template <class T, Function function, bool gated>
void activate(const Layer<T>& l, const Group& g, int64_t panel, const Slice& s, int64_t f, const float* c, T* hidden) {
  Vec weight[2];
  weights_of(l.p, g, panel, weight);
  const int64_t F = l.F, rows = std::min<int64_t>(F - f, gated ? 16 : 32), left = g.count - panel * SIDE;
  const int halves = left > 16 ? 2 : 1;
  T* kept = l.p.kept ? l.kept(s.expert, f, g.first + panel * SIDE) : nullptr;
  for (int64_t i = 0; i < (gated ? 16 : 32); i += 2) {
    Vec gate[2][2] = {}, value[2][2] = {};
    for (int h = 0; h < halves; h++) {
      Vec out[2];
      for (int j = 0; j < 2; j++) {
        const float* at = c + (i + j) * SIDE + 16 * h;
        gate[j][h] = _mm512_loadu_ps(at);
        out[j] = _mm512_mul_ps(apply<function>(gate[j][h]), weight[h]);
        if (!gated) continue;
        value[j][h] = _mm512_loadu_ps(at + 16 * SIDE);
        out[j] = _mm512_mul_ps(out[j], value[j][h]);
      }
      put_pair(hidden, f - s.f0 + i, h, out[0], out[1]);
    }
    for (int j = 0; kept && j < 2 && i + j < rows; j++) {
      put_row(kept + (i + j) * SIDE, gate[j][0], gate[j][1], SIDE);
      if (gated) put_row(kept + (F + i + j) * SIDE, value[j][0], value[j][1], SIDE);
    }
  }
}

// 32 rows of a weight matrix, in two halves of which `rows[h]` exist, `depth` values each: where they lie, but for what
// goes beyond the matrix's edges, which is copied to `packed`.
template <class T>
Left<T> left_of(Left<T> where, const int64_t rows[2], int64_t depth, T* packed) {
  if (std::min(rows[0], rows[1]) < SIDE / 2) return pack_left(where.half, rows, where.row, depth, packed);
  const int64_t whole = depth / SIDE * SIDE;
  if (Kind<T>::per_word == 1 || whole == depth) return where;
  const T* half[2] = {where.half[0] + whole, where.half[1] + whole};
  pack_left(half, rows, where.row, depth - whole, packed);
  where.tail = packed;
  return where;
}

// Twice 16 rows that come next. Of the matrix unit's long rows each has pages of its own, and the processor's own
// foresight follows all of them better.
template <class T>
Ahead rows_ahead(const T* first, const T* second, int64_t width) {
  const int64_t bytes = width * sizeof(T);
  return Kind<T>::per_word > 1 && bytes >= SMALL_PAGE ? Ahead{} : Ahead(first, second, 16 * bytes);
}

template <class T, Function function, bool gated>
void forward_slice(const Layer<T>& l, const Slice& s, float* sum) {
  const Problem& p = l.p;
  const int64_t D = l.D, F = l.F, depth = s.f1 - s.f0, padded = round_up(depth, SIDE), most = l.group() / SIDE;
  constexpr int64_t step = gated ? 16 : 32;
  const int64_t thin_floats = 16 * thin_stride(std::max(l.Dp, padded));
  scratch.reserve((most + 1) * SIDE * (l.Dp + padded) * sizeof(T) + (most * BLOCK + thin_floats) * 4 + 4096);
  T* inputs = scratch.take<T>(most * SIDE * l.Dp);
  T* hidden = scratch.take<T>(most * SIDE * padded);
  T* packed = scratch.take<T>(SIDE * std::max(l.Dp, padded));
  float* c = scratch.take<float>(most * BLOCK);
  float* thin = scratch.take<float>(thin_floats);
  const T *up = l.up(s.expert), *down = l.down(s.expert);
  // The next 32 rows of a matrix, if they lie there in one piece, or in two for gate and value.
  auto up_ahead = [&](int64_t f) {
    const T* rows = up + f * D;
    return F - f < 16 ? Ahead{} : rows_ahead(rows, gated ? rows + F * D : rows + 16 * D, D);
  };
  auto down_ahead = [&](int64_t d) {
    const T* rows = down + d * F;
    return depth < F || D - d < SIDE ? Ahead{} : rows_ahead(rows, rows + 16 * F, F);
  };
  auto up_rows = [&](int64_t f) { return Left<T>{{up + f * D, up + (gated ? F + f : f + 16) * D}, D, SIDE}; };
  auto down_rows = [&](int64_t d) { return Left<T>{{down + d * F + s.f0, down + (d + 16) * F + s.f0}, F, SIDE}; };
  for_groups(l, s.expert, [&](const Group& g, bool, bool) {
    for (int64_t i = 0; i < g.panels(); i++) {
      const T* rows[SIDE];
      rows_of(p, g, i, static_cast<const T*>(p.x), D, rows);
      transpose_panel(rows, D, reinterpret_cast<uint32_t*>(inputs + i * l.Dp * SIDE));
    }
    const Right tokens = panels_for(inputs, D, g.count, thin);
    for (int64_t f = s.f0; f < s.f0 + padded; f += step) {
      const int64_t rows[2] = {F - f, gated ? F - f : F - f - 16};
      product<T>(left_of(up_rows(f), rows, D, packed), tokens, g.count, D, c, false,
                 f + step < s.f0 + padded ? up_ahead(f + step) : down_ahead(0));
      for (int64_t i = 0; i < g.panels(); i++)
        activate<T, function, gated>(l, g, i, s, f, c + i * BLOCK, hidden + i * padded * SIDE);
    }
    const Right activated = panels_for(hidden, depth, g.count, thin);
    for (int64_t d = 0; d < D; d += SIDE) {
      const int64_t rows[2] = {D - d, D - d - 16};
      product<T>(left_of(down_rows(d), rows, depth, packed), activated, g.count, depth, c, false, down_ahead(d + SIDE),
                 [&](int64_t i) { fetch_sums(p, g, i, sum, d, D); });
      for (int64_t i = 0; i < g.panels(); i++) add_sums(p, g, i, c + i * BLOCK, sum, d, D);
    }
  });
}

}  // namespace crossways
