// One thread's backward pass through some hidden rows of one expert.
#pragma once
#include "forward.h"
#include "transposed.h"
#include "weight_gradient.h"

namespace crossways {

// Working memory.
template <class T>
struct Buffers {
  T *grad_y, *grad_y_left;       // gradient of y: a row for each pair; as left rows that sum over pairs
  T *panel;                      // one right panel of what has D values
  T* inputs;                     // right panels whose columns are input features and that sum over pairs
  T* hidden;                     // the same of weighted hidden values
  T *grad_up, *grad_up_left;     // gradient of what `up` returned, in both ways
  Stage<T> stage;                // weight gradients on their way
  float *c, *weight_grads;       // sums; sums over groups, for experts of several
  Vec* weight_sums;              // gradients of the routing weights
  int64_t grad_y_row, grad_up_row;  // values from one pair to the next

  // `rows`: of the gradient of `up`; `depth`: hidden rows. The matrices get theirs here, too.
  Buffers(const Layer<T>& l, int64_t depth, int64_t rows, Transposed<T>& to_hidden, Transposed<T>& to_inputs)
      : grad_y_row(l.Dp + LONGER<T>), grad_up_row(rows + LONGER<T>) {
    const bool several = to_hidden.several;
    const int64_t pairs = l.group(), down_values = to_hidden.packed_size(), up_values = to_inputs.packed_size();
    const int64_t of_pair = 3 * l.Dp + depth + 2 * (rows + GAP<T> + LONGER<T>);
    const int64_t staged = Stage<T>::size(std::max(l.D, l.F));
    const int64_t values = down_values + up_values + SIDE * l.Dp + pairs * of_pair + staged;
    const int64_t sums = std::max(Transposed<T>::sums(pairs), WRITTEN * SIDE);
    const int64_t floats = sums + (several ? l.Dp * (depth + rows) : 0) + pairs;
    scratch.reserve(values * sizeof(T) + floats * 4 + 8192);
    to_hidden.packed = scratch.take<T>(down_values);
    to_inputs.packed = scratch.take<T>(up_values);
    grad_y = scratch.take<T>(pairs * grad_y_row);
    grad_y_left = scratch.take<T>(pairs * (l.Dp + GAP<T>));
    panel = scratch.take<T>(SIDE * l.Dp);
    inputs = scratch.take<T>(pairs * l.Dp);
    hidden = scratch.take<T>(pairs * depth);
    grad_up = scratch.take<T>(pairs * grad_up_row);
    grad_up_left = scratch.take<T>(pairs * (rows + GAP<T>));
    stage.memory = scratch.take<T>(staged);
    c = scratch.take<float>(sums);
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

// 32 values of a left row that sums over pairs.
inline void put_left(bf16* left, int64_t row, const Vec x[2]) {
  _mm512_storeu_si512(left + row * SIDE, _mm512_inserti64x4(_mm512_castsi256_si512(narrow(x[0])), narrow(x[1]), 1));
}
inline void put_left(float* left, int64_t row, const Vec x[2]) {
  _mm512_storeu_ps(left + row * SIDE, x[0]);
  _mm512_storeu_ps(left + row * SIDE + 16, x[1]);
}

// Bring 16 hidden rows of what the forward pass kept of a panel into the cache.
template <class T, bool gated>
void fetch_kept(const Layer<T>& l, const T* kept) {
  for (int part = 0; part < (gated ? 2 : 1); part++)
    for (size_t line = 0; line < 16 * SIDE * sizeof(T); line += 64)
      asm volatile("prefetcht0 %0" : : "m"(reinterpret_cast<const char*>(kept + part * l.F * SIDE)[line]));
}

// Gradients with respect to 16 hidden rows of a panel, at `c` for each pair, to gradients of the rows of `up` that made
// them.
template <class T, Function function, bool gated>
void differentiate(const Layer<T>& l, const Slice& s, const Group& g, int64_t panel, int64_t f, const float* c,
                   int64_t c_row, const Buffers<T>& b) {
  const int64_t depth = round_up(s.f1 - s.f0, SIDE), rows = gated ? 2 * depth : depth, local = f - s.f0;
  const int64_t exist = l.F - f, pairs = g.count - panel * SIDE;
  const T* kept = l.kept(s.expert, f, g.first + panel * SIDE);
  if (pairs > SIDE) fetch_kept<T, gated>(l, kept + l.H * SIDE);
  T *by_pair = b.grad_up + panel * SIDE * b.grad_up_row, *left = b.grad_up_left + panel * (rows + GAP<T>) * SIDE;
  Vec weight[2], hidden[2][16], gates[2][16], values[2][16], *grad_weight = b.weight_sums + 2 * panel;
  weights_of(l.p, g, panel, weight);
  for (int h = 0; h < 2; h++) {
    const __mmask16 mask = first16(pairs - 16 * h);
    Vec grads[16];
    get_turned(c + 16 * h * c_row, c_row, grads);
    for (int i = 0; i < 16; i++) {
      const __mmask16 there = i < exist ? mask : 0;
      const T* at = kept + i * SIDE + 16 * h;
      Vec gate = load(at, there), slope, active = apply<function>(gate, slope);
      Vec value = gated ? load(at + l.F * SIDE, there) : _mm512_set1_ps(1.0f);
      Vec grad = _mm512_maskz_mov_ps(there, grads[i]);
      Vec out = gated ? _mm512_mul_ps(active, value) : active;
      grad_weight[h] = _mm512_fmadd_ps(grad, out, grad_weight[h]);
      grad = _mm512_mul_ps(grad, weight[h]);
      hidden[h][i] = _mm512_mul_ps(out, weight[h]);
      gates[h][i] = _mm512_mul_ps(gated ? _mm512_mul_ps(grad, value) : grad, slope);
      values[h][i] = _mm512_mul_ps(grad, active);
    }
    put_turned(by_pair + 16 * h * b.grad_up_row + local, b.grad_up_row, gates[h]);
    if (gated) put_turned(by_pair + 16 * h * b.grad_up_row + depth + local, b.grad_up_row, values[h]);
  }
  for (int i = 0; i < 16; i++) {
    const Vec gate[2] = {gates[0][i], gates[1][i]}, value[2] = {values[0][i], values[1][i]};
    put_left(left, local + i, gate);
    if (gated) put_left(left, depth + local + i, value);
  }
  const Right to = panels_of(b.hidden, g.count);
  put_columns(const_cast<uint32_t*>(to.words) + local / SIDE * to.panel + panel * to.step + local % SIDE, hidden, left);
}

inline void add_row(const float* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = first16(count - i);
    store(to + i, _mm512_add_ps(load(to + i, mask), load(from + i, mask)), mask);
  }
}

// A row for each pair, with zeros after it.
template <class T>
void gather_grad_y(const Layer<T>& l, const Group& g, const Buffers<T>& b) {
  for (int64_t i = 0; i < g.count; i++) {
    T* row = b.grad_y + i * b.grad_y_row;
    std::memcpy(row, static_cast<const T*>(l.p.grad_y) + l.p.token[g.first + i] * l.D, l.D * sizeof(T));
    std::memset(row + l.D, 0, (l.Dp - l.D) * sizeof(T));
  }
}

template <class T>
void grad_y_to_left(const Layer<T>& l, const Group& g, const Buffers<T>& b) {
  for (int64_t i = 0; i < g.panels(); i++) {
    const T* rows[SIDE];
    for (int64_t r = 0; r < SIDE; r++)
      rows[r] = i * SIDE + r < g.count ? b.grad_y + (i * SIDE + r) * b.grad_y_row : nullptr;
    T* left = b.grad_y_left + i * (l.Dp + GAP<T>) * SIDE;
    auto* panel = reinterpret_cast<uint32_t*>(Kind<T>::per_word == 1 ? left : b.panel);
    transpose_panel(rows, l.Dp, panel);
    left_rows(panel, l.Dp, left);
  }
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

// The matrices of an expert, as far as they belong to a slice.
template <class T>
Transposed<T> down_of(const Layer<T>& l, const Slice& s) {
  return {l.down(s.expert) + s.f0, l.F, 1, 0, l.D, s.f1 - s.f0, nullptr, l.load(s.expert) > l.group()};
}
template <class T>
Transposed<T> up_of(const Layer<T>& l, const Slice& s, int64_t parts) {
  return {l.up(s.expert) + s.f0 * l.D, l.D, parts, l.F * l.D, s.f1 - s.f0, l.D, nullptr, l.load(s.expert) > l.group()};
}

template <class T, Function function, bool gated>
void backward_slice(const Layer<T>& l, const Slice& s, const Slice* next, float* sum, float* grad_weight) {
  const Problem& p = l.p;
  const int64_t D = l.D, F = l.F, Dp = l.Dp, real = s.f1 - s.f0, depth = round_up(real, SIDE);
  constexpr int parts = gated ? 2 : 1;
  const int64_t rows = parts * depth;
  const bool several = l.load(s.expert) > l.group();
  T* grad_up = p.grad_up ? static_cast<T*>(p.grad_up) + s.expert * l.H * D : nullptr;
  T* grad_down = p.grad_down ? static_cast<T*>(p.grad_down) + s.expert * D * F : nullptr;
  Transposed<T> down = down_of(l, s), up = up_of(l, s, parts);
  const Piece after = next ? down_of(l, *next).begin(l.load(next->expert)) : Piece{};
  const Buffers<T> b(l, depth, rows, down, up);
  for_groups(l, s.expert, [&](const Group& g, bool first, bool last) {
    // One step after the other gathers what it needs: all of it at once would not fit the second-level cache.
    gather_grad_y(l, g, b);
    std::fill_n(b.weight_sums, 2 * g.panels(), Vec{});
    auto hidden = [&](int64_t f, int64_t count, const float* c, int64_t row) {
      for (int64_t i = 0; i < g.panels(); i++)
        for (int64_t at = 0; at < round_up(count, SIDE); at += 16)
          differentiate<T, function, gated>(l, s, g, i, s.f0 + f + at, c + i * SIDE * row + at, row, b);
    };
    down.times(b.grad_y, b.grad_y_row, g.count, first, b.c, {}, hidden);
    if (grad_weight)
      for (int64_t i = 0; i < 2 * g.panels(); i++)
        store(grad_weight + g.first - p.offsets[s.expert] + 16 * i, b.weight_sums[i], first16(g.count - 16 * i));
    float *down_total = several ? b.weight_grads : nullptr, *up_total = several ? down_total + Dp * depth : nullptr;
    if (grad_down) {
      grad_y_to_left(l, g, b);
      auto place = [&](int64_t d, int64_t f) {
        return Place<T>{grad_down + d * F + s.f0 + f, F, D - d, F - s.f0 - f};
      };
      weight_gradient(b.grad_y_left, Dp, D, panels_of(b.hidden, g.count), depth, g.count, b.c, down_total, first, last,
                      b.stage, {}, place);
    }
    if (grad_up) {
      gather_inputs(l, g, b);
      auto place = [&](int64_t r, int64_t d) {
        const int64_t f = s.f0 + r % depth, row = r < depth ? f : F + f;
        return Place<T>{grad_up + row * D + d, D, F - f, D - d};
      };
      weight_gradient(b.grad_up_left, rows, rows, panels_of(b.inputs, g.count), Dp, g.count, b.c, up_total, first, last,
                      b.stage, up.begin(g.count), place);
    }
    if (!sum) return;
    auto inputs = [&](int64_t d, int64_t count, const float* c, int64_t row) {
      for (int64_t i = 0; i < g.count; i++) add_row(c + i * row, count, sum + p.token[g.first + i] * D + d);
    };
    up.times(b.grad_up, b.grad_up_row, g.count, first, b.c, after, inputs);
  });
}

}  // namespace crossways
