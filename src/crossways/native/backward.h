// One thread's backward pass through some hidden rows of one expert.
#pragma once
#include "forward.h"

namespace crossways {

// Working memory. Left rows and right panels of float32 are the same numbers in the same order, kept once.
template <class T>
struct Buffers {
  T *down_columns, *up_columns;      // the expert's matrices, transposed
  T *grad_y, *grad_y_left;           // gradient of y, as right panels and as left rows
  T* inputs;                         // right panels whose columns are input features and that sum over pairs
  T* hidden;                         // the same of weighted hidden values
  T *grad_up, *grad_up_left;         // gradient of what `up` returned, as right panels and as left rows
  float *c, *weight_grads;           // blocks; sums over groups, for experts of several
  Vec* weight_sums;                  // gradients of the routing weights

  // `rows`: of the gradient of `up`; `depth`: hidden rows; `several`: whether there is more than one group.
  Buffers(const Layer<T>& l, int64_t depth, int64_t rows, bool several) {
    constexpr bool same = Kind<T>::per_word == 1;
    const int64_t pairs = l.group(), blocks = std::max({pairs, l.Dp, depth}) / SIDE;
    const int64_t values = l.Dp * (depth + rows) + pairs * (3 * l.Dp + depth + 2 * rows);
    const int64_t floats = blocks * BLOCK + (several ? l.Dp * (depth + rows) : 0) + pairs;
    scratch.reserve(values * sizeof(T) + floats * 4 + 8192);
    down_columns = scratch.take<T>(l.Dp * depth);
    up_columns = scratch.take<T>(l.Dp * rows);
    grad_y = scratch.take<T>(pairs * l.Dp);
    grad_y_left = same ? grad_y : scratch.take<T>(pairs * l.Dp);
    inputs = scratch.take<T>(pairs * l.Dp);
    hidden = scratch.take<T>(pairs * depth);
    grad_up = scratch.take<T>(pairs * rows);
    grad_up_left = same ? grad_up : scratch.take<T>(pairs * rows);
    c = scratch.take<float>(blocks * BLOCK);
    weight_grads = scratch.take<float>(several ? l.Dp * (depth + rows) : 0);
    weight_sums = scratch.take<Vec>(pairs / 16);
  }
};

// 16 hidden rows of 32 pairs, to a right panel whose columns are hidden rows and that sums over pairs.
inline void put_columns(uint32_t* words, const Vec rows[2][16], const bf16*) {
  Words square[16];
  for (int i = 0; i < 16; i++)
    square[i] = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(rows[0][i])), narrow(rows[1][i]), 1);
  transpose(square);
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(words + i * SIDE, square[i]);
}
inline void put_columns(uint32_t* words, const Vec rows[2][16], const float*) {
  for (int h = 0; h < 2; h++) {
    Words square[16];
    for (int i = 0; i < 16; i++) square[i] = _mm512_castps_si512(rows[h][i]);
    transpose(square);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(words + (16 * h + i) * SIDE, square[i]);
  }
}

inline void put_left(bf16* left, int64_t row, int h, Vec x) { store(left + row * SIDE + 16 * h, x); }
inline void put_left(float*, int64_t, int, Vec) {}  // the right panel serves

// Gradients with respect to 16 hidden rows of a panel, to gradients of the rows of `up` that made them.
template <class T, Function function, bool gated>
void differentiate(const Layer<T>& l, const Slice& s, const Group& g, int64_t panel, int64_t f, const float* c,
                   const Buffers<T>& b) {
  const int64_t depth = round_up(s.f1 - s.f0, SIDE), rows = gated ? 2 * depth : depth, local = f - s.f0;
  const int64_t columns = l.columns(s.expert), exist = l.F - f;
  T *right = b.grad_up + panel * rows * SIDE, *left = b.grad_up_left + panel * rows * SIDE;
  Vec weight[2], hidden[2][16];
  weights_of(l.p, g, panel, weight);
  for (int h = 0; h < 2; h++) {
    const int64_t at = panel * SIDE + 16 * h;
    const __mmask16 mask = first16(g.count - at);
    const T* kept = l.kept(s.expert, f, g.first + at);
    Vec grad_weight = b.weight_sums[2 * panel + h];
    for (int i = 0; i < 16; i += 2) {
      Vec grad_gate[2], grad_value[2];
      for (int j = 0; j < 2; j++) {
        const __mmask16 there = i + j < exist ? mask : 0;
        Vec gate = load(kept + (i + j) * columns, there), slope, active = apply<function>(gate, slope);
        Vec value = gated ? load(kept + (l.F + i + j) * columns, there) : _mm512_set1_ps(1.0f);
        Vec grad = load(c + (i + j) * SIDE + 16 * h, mask);
        Vec out = gated ? _mm512_mul_ps(active, value) : active;
        grad_weight = _mm512_fmadd_ps(grad, out, grad_weight);
        grad = _mm512_mul_ps(grad, weight[h]);
        hidden[h][i + j] = _mm512_mul_ps(out, weight[h]);
        grad_gate[j] = _mm512_mul_ps(gated ? _mm512_mul_ps(grad, value) : grad, slope);
        grad_value[j] = _mm512_mul_ps(grad, active);
        put_left(left, local + i + j, h, grad_gate[j]);
        if (gated) put_left(left, depth + local + i + j, h, grad_value[j]);
      }
      put_pair(right, local + i, h, grad_gate[0], grad_gate[1]);
      if (gated) put_pair(right, depth + local + i, h, grad_value[0], grad_value[1]);
    }
    b.weight_sums[2 * panel + h] = grad_weight;
  }
  const Right to = panels_of(b.hidden, g.count);
  put_columns(const_cast<uint32_t*>(to.words) + local / SIDE * to.panel + panel * to.step + local % SIDE, hidden, left);
}

// Write a block of a weight gradient as far as the matrix goes, past the caches where whole lines are written.
inline void put_row(float* to, Vec a, Vec b, int64_t columns) {
  if (columns >= SIDE && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    _mm512_stream_ps(to, a);
    _mm512_stream_ps(to + 16, b);
    return;
  }
  store(to, a, first16(columns));
  store(to + 16, b, first16(columns - 16));
}
inline void put_row(bf16* to, Vec a, Vec b, int64_t columns) {
  Words row = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a)), narrow(b), 1);
  if (columns >= SIDE && reinterpret_cast<uintptr_t>(to) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<Words*>(to), row);
  else
    _mm512_mask_storeu_epi16(to, first32(columns), row);
}
template <class T>
void put_block(const float* c, T* matrix, int64_t stride, int64_t rows, int64_t columns) {
  for (int i = 0; i < std::min<int64_t>(rows, SIDE); i++)
    put_row(matrix + i * stride, load(c + i * SIDE), load(c + i * SIDE + 16), columns);
}

template <class T>
void gather_group(const Layer<T>& l, const Group& g, const Buffers<T>& b) {
  const Problem& p = l.p;
  const Right inputs = panels_of(b.inputs, g.count);
  const T* rows[SIDE];
  for (int64_t i = 0; i < g.panels(); i++) {
    rows_of(p, g, i, static_cast<const T*>(p.grad_y), l.D, rows);
    auto* panel = reinterpret_cast<uint32_t*>(b.grad_y + i * l.Dp * SIDE);
    transpose_panel(rows, l.D, panel);
    if (p.grad_down) left_rows(panel, l.Dp, b.grad_y_left + i * l.Dp * SIDE);
    if (!p.grad_up) continue;
    rows_of(p, g, i, static_cast<const T*>(p.x), l.D, rows);
    pair_rows(rows, l.D, const_cast<uint32_t*>(inputs.words) + i * inputs.step, inputs.panel);
  }
}

// A weight gradient: for every 32 of `rows` rows, left rows at `left` (whose panels hold `all` rows) times `right`.
// Experts of several groups add up in `total`; the last group writes, by `put(block, row, panel)`.
template <class T, class Put>
void weight_gradient(const T* left, int64_t all, int64_t rows, const Right& right, int64_t columns, int64_t pairs,
                     float* c, float* total, bool first, bool last, Put&& put) {
  for (int64_t r = 0; r < rows; r += SIDE) {
    const T* at = left + r * SIDE;
    float* to = total ? total + r * columns : c;
    product(Left<T>{{at, at + 16 * SIDE}, SIDE, all * SIDE}, right, columns, pairs, to, !first);
    if (!last) continue;
    for (int64_t i = 0; i < columns / SIDE; i++) put(to + i * BLOCK, r, i * SIDE);
  }
}

template <class T, Function function, bool gated>
void backward_slice(const Layer<T>& l, const Slice& s, float* sum, float* grad_weight) {
  const Problem& p = l.p;
  const int64_t D = l.D, F = l.F, Dp = l.Dp, real = s.f1 - s.f0, depth = round_up(real, SIDE);
  constexpr int parts = gated ? 2 : 1;
  const int64_t rows = parts * depth;
  const bool several = l.load(s.expert) > l.group();
  const Buffers<T> b(l, depth, rows, several);
  T* grad_up = p.grad_up ? static_cast<T*>(p.grad_up) + s.expert * l.H * D : nullptr;
  T* grad_down = p.grad_down ? static_cast<T*>(p.grad_down) + s.expert * D * F : nullptr;
  pack_columns(l.down(s.expert) + s.f0, F, D, real, b.down_columns);
  if (sum)
    for (int part = 0; part < parts; part++)  // columns beyond F of a padded slice stay out of the sum: see below
      pack_columns(l.up(s.expert) + (part * F + s.f0) * D, D, real, D, b.up_columns + part * Dp * depth);
  for_groups(l, s.expert, [&](const Group& g, bool first, bool last) {
    gather_group(l, g, b);
    std::fill_n(b.weight_sums, 2 * g.panels(), Vec{});
    for (int64_t f = 0; f < depth; f += SIDE) {
      product(packed_rows(b.down_columns, D, f / SIDE), panels_of(b.grad_y, D), g.count, D, b.c);
      for (int64_t i = 0; i < g.panels(); i++)
        for (int h = 0; h < 2; h++)
          differentiate<T, function, gated>(l, s, g, i, s.f0 + f + 16 * h, b.c + i * BLOCK + h * 16 * SIDE, b);
    }
    if (grad_weight)
      for (int64_t i = 0; i < 2 * g.panels(); i++)
        store(grad_weight + g.first - p.offsets[s.expert] + 16 * i, b.weight_sums[i], first16(g.count - 16 * i));
    float *down_total = several ? b.weight_grads : nullptr, *up_total = several ? down_total + Dp * depth : nullptr;
    if (grad_down)
      weight_gradient(b.grad_y_left, Dp, D, panels_of(b.hidden, g.count), depth, g.count, b.c, down_total, first, last,
                      [&](const float* block, int64_t d, int64_t f) {
                        put_block(block, grad_down + d * F + s.f0 + f, F, D - d, F - s.f0 - f);
                      });
    if (grad_up)
      weight_gradient(b.grad_up_left, rows, rows, panels_of(b.inputs, g.count), Dp, g.count, b.c, up_total, first, last,
                      [&](const float* block, int64_t r, int64_t d) {
                        const int64_t f = s.f0 + r % depth, row = r < depth ? f : F + f;
                        put_block(block, grad_up + row * D + d, D, F - f, D - d);
                      });
    if (!sum) return;
    for (int64_t d = 0; d < D; d += SIDE) {
      for (int part = 0; part < parts; part++) {
        Right right = panels_of(b.grad_up, rows);
        right.words += part * depth / SIDE * right.step;
        product(packed_rows(b.up_columns + part * Dp * depth, real, d / SIDE), right, g.count, real, b.c, part > 0);
      }
      for (int64_t i = 0; i < g.panels(); i++) {
        float* to[SIDE];
        rows_of(p, g, i, sum, D, to);
        add_columns(b.c + i * BLOCK, to, d, D);
      }
    }
  });
}

}  // namespace crossways
