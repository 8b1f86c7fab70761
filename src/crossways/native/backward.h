// One thread's backward pass through some hidden rows of one expert.
#pragma once
#include "forward.h"
#include "transposed.h"

namespace crossways {

// Left rows of bfloat16 lie this far apart from panel to panel, beyond their number: at a multiple of 4 KB all panels
// would share a few sets of the first-level cache.
template <class T>
constexpr int64_t GAP = Kind<T>::per_word == 1 ? 0 : SIDE;

// How many columns of a weight gradient are written at once.
constexpr int64_t WRITTEN = 64;

// Working memory. Left rows and right panels of float32 are the same numbers in the same order, kept once.
template <class T>
struct Buffers {
  T *down_columns, *up_columns;      // the expert's matrices, transposed; parts of them if there is one group
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
    const int64_t down_values = several ? l.Dp * depth : std::max(l.Dp * COLUMNS, depth * ROWS);
    const int64_t up_values = several ? rows * l.Dp : std::max(rows * COLUMNS, l.Dp * ROWS);
    const int64_t values = down_values + up_values + pairs * (3 * l.Dp + depth + 2 * rows + 2 * GAP<T>);
    const int64_t block_values = std::max(blocks * BLOCK, SUMS);
    const int64_t floats = block_values + (several ? l.Dp * (depth + rows) : 0) + pairs;
    scratch.reserve(values * sizeof(T) + floats * 4 + 8192);
    down_columns = scratch.take<T>(down_values);
    up_columns = scratch.take<T>(up_values);
    grad_y = scratch.take<T>(pairs * l.Dp);
    grad_y_left = same ? grad_y : scratch.take<T>(pairs * (l.Dp + GAP<T>));
    inputs = scratch.take<T>(pairs * l.Dp);
    hidden = scratch.take<T>(pairs * depth);
    grad_up = scratch.take<T>(pairs * rows);
    grad_up_left = same ? grad_up : scratch.take<T>(pairs * (rows + GAP<T>));
    c = scratch.take<float>(block_values);
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

// 32 values of a left row that sums over pairs; of float32 the right panel serves.
inline void put_left(bf16* left, int64_t row, const Vec x[2]) {
  _mm512_storeu_si512(left + row * SIDE, _mm512_inserti64x4(_mm512_castsi256_si512(narrow(x[0])), narrow(x[1]), 1));
}
inline void put_left(float*, int64_t, const Vec[2]) {}

// Bring 16 hidden rows of what the forward pass kept of a panel into the cache.
template <class T, bool gated>
void fetch_kept(const Layer<T>& l, const T* kept) {
  for (int part = 0; part < (gated ? 2 : 1); part++)
    for (size_t line = 0; line < 16 * SIDE * sizeof(T); line += 64)
      asm volatile("prefetcht0 %0" : : "m"(reinterpret_cast<const char*>(kept + part * l.F * SIDE)[line]));
}

// Gradients with respect to 16 hidden rows of a panel, to gradients of the rows of `up` that made them.
template <class T, Function function, bool gated>
void differentiate(const Layer<T>& l, const Slice& s, const Group& g, int64_t panel, int64_t f, const float* c,
                   const Buffers<T>& b) {
  const int64_t depth = round_up(s.f1 - s.f0, SIDE), rows = gated ? 2 * depth : depth, local = f - s.f0;
  const int64_t exist = l.F - f, pairs = g.count - panel * SIDE;
  const T* kept = l.kept(s.expert, f, g.first + panel * SIDE);
  if (pairs > SIDE) fetch_kept<T, gated>(l, kept + l.H * SIDE);
  T *right = b.grad_up + panel * rows * SIDE, *left = b.grad_up_left + panel * (rows + GAP<T>) * SIDE;
  const __mmask16 mask[2] = {first16(pairs), first16(pairs - 16)};
  Vec weight[2], hidden[2][16], *grad_weight = b.weight_sums + 2 * panel;
  weights_of(l.p, g, panel, weight);
  for (int i = 0; i < 16; i += 2) {
    Vec grad_gate[2][2], grad_value[2][2];
    for (int j = 0; j < 2; j++)
      for (int h = 0; h < 2; h++) {
        const __mmask16 there = i + j < exist ? mask[h] : 0;
        const T* at = kept + (i + j) * SIDE + 16 * h;
        Vec gate = load(at, there), slope, active = apply<function>(gate, slope);
        Vec value = gated ? load(at + l.F * SIDE, there) : _mm512_set1_ps(1.0f);
        Vec grad = load(c + (i + j) * SIDE + 16 * h, mask[h]);
        Vec out = gated ? _mm512_mul_ps(active, value) : active;
        grad_weight[h] = _mm512_fmadd_ps(grad, out, grad_weight[h]);
        grad = _mm512_mul_ps(grad, weight[h]);
        hidden[h][i + j] = _mm512_mul_ps(out, weight[h]);
        grad_gate[j][h] = _mm512_mul_ps(gated ? _mm512_mul_ps(grad, value) : grad, slope);
        grad_value[j][h] = _mm512_mul_ps(grad, active);
      }
    for (int j = 0; j < 2; j++) {
      put_left(left, local + i + j, grad_gate[j]);
      if (gated) put_left(left, depth + local + i + j, grad_value[j]);
    }
    for (int h = 0; h < 2; h++) {
      put_pair(right, local + i, h, grad_gate[0][h], grad_gate[1][h]);
      if (gated) put_pair(right, depth + local + i, h, grad_value[0][h], grad_value[1][h]);
    }
  }
  const Right to = panels_of(b.hidden, g.count);
  put_columns(const_cast<uint32_t*>(to.words) + local / SIDE * to.panel + panel * to.step + local % SIDE, hidden, left);
}

// Write a block of a weight gradient as far as the matrix goes.
template <class T>
void put_block(const float* c, T* matrix, int64_t stride, int64_t rows, int64_t columns) {
  for (int i = 0; i < std::min<int64_t>(rows, SIDE); i++)
    put_row(matrix + i * stride, load(c + i * SIDE), load(c + i * SIDE + 16), columns);
}

template <class T>
void gather_grad_y(const Layer<T>& l, const Group& g, const Buffers<T>& b) {
  const T* rows[SIDE];
  for (int64_t i = 0; i < g.panels(); i++) {
    rows_of(l.p, g, i, static_cast<const T*>(l.p.grad_y), l.D, rows);
    transpose_panel(rows, l.D, reinterpret_cast<uint32_t*>(b.grad_y + i * l.Dp * SIDE));
  }
}

template <class T>
void grad_y_to_left(const Layer<T>& l, const Group& g, const Buffers<T>& b) {
  for (int64_t i = 0; i < g.panels(); i++)
    left_rows(reinterpret_cast<const uint32_t*>(b.grad_y + i * l.Dp * SIDE), l.Dp,
              b.grad_y_left + i * (l.Dp + GAP<T>)*SIDE);
}

template <class T>
void gather_inputs(const Layer<T>& l, const Group& g, const Buffers<T>& b) {
  const Right inputs = panels_of(b.inputs, g.count);
  const T* rows[SIDE];
  for (int64_t i = 0; i < g.panels(); i++) {
    rows_of(l.p, g, i, static_cast<const T*>(l.p.x), l.D, rows);
    pair_rows(rows, l.D, const_cast<uint32_t*>(inputs.words) + i * inputs.step, inputs.panel);
  }
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
        product<T>(these, some, count, pairs, Out(reinterpret_cast<float*>(to.at), to.stride));
        continue;
      }
      float* sums = total ? total + r * columns + column * SIDE : c;
      product<T>(these, some, count, pairs, sums, !first);
      for (int64_t i = 0; last && i < count; i += SIDE)
        put_block(sums + i * SIDE, to.at + i, to.stride, to.rows, to.columns - i);
    }
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
  const Transposed<T> down{l.down(s.expert) + s.f0, F, 1, 0, D, real, b.down_columns, several};
  const Transposed<T> up{l.up(s.expert) + s.f0 * D, D, parts, F * D, real, D, b.up_columns, several};
  for_groups(l, s.expert, [&](const Group& g, bool first, bool last) {
    // One step after the other gathers what it needs: all of it at once would not fit the second-level cache.
    gather_grad_y(l, g, b);
    std::fill_n(b.weight_sums, 2 * g.panels(), Vec{});
    down.times(panels_of(b.grad_y, D), g.count, first, b.c, [](int64_t, int64_t) {}, [&](int64_t f, const float* c) {
      for (int64_t i = 0; i < g.panels(); i++)
        for (int h = 0; h < 2; h++)
          differentiate<T, function, gated>(l, s, g, i, s.f0 + f + 16 * h, c + i * BLOCK + h * 16 * SIDE, b);
    });
    if (grad_weight)
      for (int64_t i = 0; i < 2 * g.panels(); i++)
        store(grad_weight + g.first - p.offsets[s.expert] + 16 * i, b.weight_sums[i], first16(g.count - 16 * i));
    float *down_total = several ? b.weight_grads : nullptr, *up_total = several ? down_total + Dp * depth : nullptr;
    if (grad_down) {
      grad_y_to_left(l, g, b);
      weight_gradient(b.grad_y_left, Dp, D, panels_of(b.hidden, g.count), depth, g.count, b.c, down_total, first, last,
                      [&](int64_t d, int64_t f) {
                        return Place<T>{grad_down + d * F + s.f0 + f, F, D - d, F - s.f0 - f};
                      });
    }
    if (grad_up) {
      gather_inputs(l, g, b);
      weight_gradient(b.grad_up_left, rows, rows, panels_of(b.inputs, g.count), Dp, g.count, b.c, up_total, first, last,
                      [&](int64_t r, int64_t d) {
                        const int64_t f = s.f0 + r % depth, row = r < depth ? f : F + f;
                        return Place<T>{grad_up + row * D + d, D, F - f, D - d};
                      });
    }
    if (!sum) return;
    up.times(panels_of(b.grad_up, rows), g.count, first, b.c,
             [&](int64_t d, int64_t panel) { fetch_sums(p, g, panel, sum, d, D); },
             [&](int64_t d, const float* c) {
               for (int64_t i = 0; i < g.panels(); i++) add_sums(p, g, i, c + i * BLOCK, sum, d, D);
             });
  });
}

}  // namespace crossways
