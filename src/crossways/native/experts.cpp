// Expert compute for the CPU: y[t] = sum over t's pairs of weight * down_e(f(up_e(x[t]))), and its gradients.
//
// Tokens are the columns of every product, so weights are the left operand and are read where they lie, once for up to
// GROUP tokens. What stands between the products happens on blocks of 32 x 32 that are still in the cache. A thread
// owns some rows of the hidden layer of some experts, hence their weight gradients; it adds its share of y, or of the
// gradient of x, to a sum of its own, and the sums are added up at the end, in the same order every time.
//
// Legend: T tokens, P pairs sorted by expert, E experts, D model width, F expert width, H rows of the first matrix.
#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <memory>
#include <vector>

#include "rows.h"

using namespace crossways;

extern "C" struct Problem {
  int64_t tokens, experts, width, expert_width, gated, function, threads;
  const int64_t *token, *offsets;  // (P,), (E + 1,)
  const float* weight;             // (P,)
  const void *x, *up, *down;       // (T, D), (E, H, D), (E, D, F)
  void* kept;                      // what `up` returned, for backward; null when not wanted
  void* y;                         // (T, D)
  const void* grad_y;              // (T, D)
  void *grad_x, *grad_up, *grad_down;  // as x, up, down; null when not wanted
  float* grad_weight;                  // (P,); null when not wanted
};

namespace {

enum Function { SILU, GELU, RELU };
constexpr int64_t GROUP_BYTES = 1 << 19, GROUP_MIN = 64, GROUP_MAX = 256;
constexpr int64_t HUGE_PAGE = 1 << 21;

// Ask for large pages: touching fresh memory then costs a tenth.
void large_pages(void* memory, size_t bytes) {
  auto first = (reinterpret_cast<uintptr_t>(memory) + HUGE_PAGE - 1) & ~uintptr_t(HUGE_PAGE - 1);
  auto last = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~uintptr_t(HUGE_PAGE - 1);
  if (memory && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Zeros that cost nothing until they are touched.
struct Zeros {
  float* data;
  size_t bytes;
  explicit Zeros(size_t count) : bytes(round_up(count * 4 + 1, HUGE_PAGE)) {
    void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    data = memory == MAP_FAILED ? nullptr : static_cast<float*>(memory);
    large_pages(data, bytes);
  }
  ~Zeros() {
    if (data) munmap(data, bytes);
  }
};

// Working memory of one thread, kept between calls.
struct Scratch {
  char* memory = nullptr;
  size_t size = 0, used = 0;
  ~Scratch() { free(memory); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    free(memory);
    size = round_up(bytes, HUGE_PAGE);
    memory = static_cast<char*>(aligned_alloc(HUGE_PAGE, size));
    if (!memory) abort();
    large_pages(memory, size);
  }
  template <class U>
  U* take(size_t count) {
    char* at = memory + used;
    used += round_up(count * sizeof(U), 64);
    return reinterpret_cast<U*>(at);
  }
};
thread_local Scratch scratch;

// Rows [f0, f1) of the hidden layer of one expert, for all its pairs.
struct Slice {
  int64_t expert, f0, f1;
};

// What every thread does: equal shares of the work, cut between experts or within one at multiples of 32 rows.
std::vector<std::vector<Slice>> share(const Problem& p) {
  const int64_t blocks = round_up(p.expert_width, SIDE) / SIDE;
  // Reading an expert's weights costs about as much as multiplying by 64 tokens.
  auto cost = [&](int64_t e) {
    int64_t load = p.offsets[e + 1] - p.offsets[e];
    return load ? round_up(load, SIDE) + 64 : 0;
  };
  double total = 0, done = 0;
  for (int64_t e = 0; e < p.experts; e++) total += double(cost(e)) * blocks;
  std::vector<std::vector<Slice>> shares(p.threads);
  for (int64_t e = 0; e < p.experts; e++) {
    if (!cost(e)) continue;
    for (int64_t b = 0; b < blocks;) {
      int64_t thread = std::min<int64_t>(p.threads - 1, int64_t((done + 0.5 * cost(e)) / total * p.threads));
      double left = total * (thread + 1) / p.threads - done;
      int64_t take = thread == p.threads - 1 ? blocks - b : std::clamp<int64_t>(left / cost(e) + 0.5, 1, blocks - b);
      shares[thread].push_back({e, b * SIDE, std::min(p.expert_width, (b + take) * SIDE)});
      b += take;
      done += double(take) * cost(e);
    }
  }
  return shares;
}

template <class T>
struct Layer {
  const Problem& p;
  const int64_t D = p.width, F = p.expert_width, H = p.gated ? 2 * F : F;
  const int64_t Dp = round_up(D, SIDE);
  const bool aligned = D % SIDE == 0 && F % SIDE == 0;
  std::vector<int64_t> kept_at;  // first column of each expert in `kept`

  explicit Layer(const Problem& problem) : p(problem), kept_at(problem.experts + 1) {
    for (int64_t e = 0; e < p.experts; e++) kept_at[e + 1] = kept_at[e] + round_up(load(e), SIDE);
  }
  int64_t load(int64_t e) const { return p.offsets[e + 1] - p.offsets[e]; }
  int64_t group() const {
    return std::clamp<int64_t>(GROUP_BYTES / (Dp * sizeof(T)) / SIDE * SIDE, GROUP_MIN, GROUP_MAX);
  }
  const T* up(int64_t e) const { return static_cast<const T*>(p.up) + e * H * D; }
  const T* down(int64_t e) const { return static_cast<const T*>(p.down) + e * D * F; }
  // Row h of what `up` returned for expert e, at pair `pair` of all.
  T* kept(int64_t e, int64_t h, int64_t pair) const {
    int64_t columns = kept_at[e + 1] - kept_at[e];
    return static_cast<T*>(p.kept) + kept_at[e] * H + h * columns + pair - p.offsets[e];
  }
};

// Up to GROUP pairs of one expert.
struct Group {
  int64_t first, count;
  int panels;
};

template <class T, class Do>
void for_groups(const Layer<T>& l, int64_t e, Do&& run) {
  int64_t n = l.load(e), groups = (n + l.group() - 1) / l.group();
  int64_t size = round_up((n + groups - 1) / groups, SIDE);
  for (int64_t at = 0; at < n; at += size) {
    int64_t count = std::min(size, n - at);
    run(Group{l.p.offsets[e] + at, count, int((count + SIDE - 1) / SIDE)}, at == 0, at + size >= n);
  }
}

// Pointers to the rows of the 32 pairs of a panel; null after the group's last.
template <class T, class From>
void rows_of(const Problem& p, const Group& g, int panel, From* matrix, int64_t width, T** rows) {
  for (int i = 0; i < SIDE; i++) {
    int64_t at = int64_t(panel) * SIDE + i;
    rows[i] = at < g.count ? static_cast<T*>(matrix) + p.token[g.first + at] * width : nullptr;
  }
}

void weights_of(const Problem& p, const Group& g, int panel, Vec out[2]) {
  for (int c = 0; c < 2; c++) {
    int64_t at = int64_t(panel) * SIDE + 16 * c;
    out[c] = load(p.weight + g.first + at, first16(g.count - at));
  }
}

Vec apply(int64_t function, Vec x) {
  const Vec one = _mm512_set1_ps(1.0f);
  switch (function) {
    case SILU: return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(one, exp(_mm512_sub_ps(Vec{}, x)))));
    case GELU: {
      Vec half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
      return _mm512_fmadd_ps(half, erf(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752f))), half);
    }
    default: return _mm512_max_ps(Vec{}, x);
  }
}

// f(x) and f'(x).
Vec apply(int64_t function, Vec x, Vec& slope) {
  const Vec one = _mm512_set1_ps(1.0f);
  switch (function) {
    case SILU: {
      Vec s = reciprocal(_mm512_add_ps(one, exp(_mm512_sub_ps(Vec{}, x))));
      Vec y = _mm512_mul_ps(x, s);
      slope = _mm512_fmadd_ps(y, _mm512_sub_ps(one, s), s);
      return y;
    }
    case GELU: {
      Vec cdf = _mm512_fmadd_ps(erf(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752f))), _mm512_set1_ps(0.5f),
                                _mm512_set1_ps(0.5f));
      Vec density = _mm512_mul_ps(exp(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f))),
                                  _mm512_set1_ps(0.39894228040143268f));
      slope = _mm512_fmadd_ps(x, density, cdf);
      return _mm512_mul_ps(x, cdf);
    }
    default:
      slope = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, Vec{}, _CMP_NLE_UQ), one);
      return _mm512_max_ps(Vec{}, x);
  }
}

// Two neighbouring rows of a right panel.
void put_pair(float* panel, int64_t row, int c, Vec low, Vec high) {
  _mm512_storeu_ps(panel + row * SIDE + 16 * c, low);
  _mm512_storeu_ps(panel + (row + 1) * SIDE + 16 * c, high);
}
void put_pair(bf16* panel, int64_t row, int c, Vec low, Vec high) {
  _mm512_storeu_si512(reinterpret_cast<uint32_t*>(panel) + row / 2 * SIDE + 16 * c, pair_words(low, high));
}

template <class T>
Right panels_of(const T* words, int64_t depth) {
  constexpr int per = Kind<T>::per_word;
  return {reinterpret_cast<const uint32_t*>(words), SIDE, BLOCK / per, depth * SIDE / per};
}

// Forward ---------------------------------------------------------------------------------------------------------

// The first product's block to a hidden block: gated, 16 gate rows over 16 value rows; plain, 32 rows.
template <class T>
void activate(const Layer<T>& l, const Group& g, int panel, int64_t e, int64_t f, int64_t f0, const float* c, T* hidden) {
  const Problem& p = l.p;
  Vec weight[2];
  weights_of(p, g, panel, weight);
  const int rows = p.gated ? 16 : 32;
  for (int i = 0; i < rows; i += 2)
    for (int h = 0; h < 2; h++) {
      Vec out[2];
      const int64_t at = int64_t(panel) * SIDE + 16 * h;
      for (int j = 0; j < 2; j++) {
        Vec gate = _mm512_loadu_ps(c + (i + j) * SIDE + 16 * h);
        out[j] = apply(p.function, gate);
        if (p.kept && f + i + j < l.F)
          store(l.kept(e, f + i + j, g.first + at), gate, first16(g.count - at));
        if (!p.gated) continue;
        Vec value = _mm512_loadu_ps(c + (16 + i + j) * SIDE + 16 * h);
        out[j] = _mm512_mul_ps(out[j], value);
        if (p.kept && f + i + j < l.F)
          store(l.kept(e, l.F + f + i + j, g.first + at), value, first16(g.count - at));
      }
      put_pair(hidden, f - f0 + i, h, _mm512_mul_ps(out[0], weight[h]), _mm512_mul_ps(out[1], weight[h]));
    }
}

template <class T>
void forward_slice(const Layer<T>& l, const Slice& s, float* sum) {
  const Problem& p = l.p;
  const int64_t D = l.D, F = l.F, Dp = l.Dp, depth = round_up(s.f1 - s.f0, SIDE), most = l.group() / SIDE;
  scratch.reserve((most * (Dp + depth) * SIDE + SIDE * (Dp + depth)) * sizeof(T) + most * BLOCK * 4 + 4096);
  T* inputs = scratch.take<T>(most * Dp * SIDE);
  T* hidden = scratch.take<T>(most * depth * SIDE);
  T* packed = scratch.take<T>(SIDE * (Dp + depth));
  float* c = scratch.take<float>(most * BLOCK);
  const T *up = l.up(s.expert), *down = l.down(s.expert);
  for_groups(l, s.expert, [&](const Group& g, bool, bool) {
    for (int i = 0; i < g.panels; i++) {
      const T* rows[SIDE];
      rows_of(p, g, i, static_cast<const T*>(p.x), D, rows);
      transpose_panel(rows, D, reinterpret_cast<uint32_t*>(inputs + i * Dp * SIDE));
    }
    const int step = p.gated ? 16 : 32;
    for (int64_t f = s.f0; f < s.f0 + depth; f += step) {
      const T* half[2] = {up + f * D, up + (p.gated ? F + f : f + 16) * D};
      const int64_t count[2] = {F - f, p.gated ? F - f : F - f - 16};
      Left<T> left = l.aligned ? Left<T>{{half[0], half[1]}, D, SIDE} : pack_left(half, count, D, D, packed);
      product(left, panels_of(inputs, Dp), g.panels, Dp / SIDE, c);
      for (int i = 0; i < g.panels; i++)
        activate(l, g, i, s.expert, f, s.f0, c + i * BLOCK, hidden + i * depth * SIDE);
    }
    for (int64_t d = 0; d < D; d += SIDE) {
      const T* half[2] = {down + d * F + s.f0, down + (d + 16) * F + s.f0};
      const int64_t count[2] = {D - d, D - d - 16};
      Left<T> left = l.aligned ? Left<T>{{half[0], half[1]}, F, SIDE} : pack_left(half, count, F, s.f1 - s.f0, packed);
      product(left, panels_of(hidden, depth), g.panels, depth / SIDE, c);
      for (int i = 0; i < g.panels; i++) {
        float* rows[SIDE];
        rows_of(p, g, i, sum, D, rows);
        add_columns(c + i * BLOCK, rows, d, D);
      }
    }
  });
}

// Add up the threads' sums, rounding once.
template <class T>
void add_up(const std::vector<std::unique_ptr<Zeros>>& sums, int64_t first, int64_t last, T* out) {
  for (int64_t i = first; i < last; i += 16) {
    const __mmask16 mask = first16(last - i);
    Vec x = load(sums[0]->data + i, mask);
    for (size_t s = 1; s < sums.size(); s++) x = _mm512_add_ps(x, load(sums[s]->data + i, mask));
    store(out + i, x, mask);
  }
}

// Run `work` on every thread's slices, each with its sum, then write the total of the sums to `out`.
template <class T, class Work>
bool run_shares(const Problem& p, T* out, Work&& work) {
  const auto shares = share(p);
  const int64_t size = p.tokens * p.width;
  std::vector<std::unique_ptr<Zeros>> sums;
  for (const auto& slices : shares)
    if (out && !slices.empty()) sums.push_back(std::make_unique<Zeros>(size));
  if (out && sums.empty()) sums.push_back(std::make_unique<Zeros>(size));
  for (const auto& sum : sums)
    if (!sum->data) return false;
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t team = omp_get_num_threads();
    {
      Tiles tiles;
      size_t used = 0;
      for (int64_t t = 0; t < p.threads; t++) {
        if (t % team == omp_get_thread_num())
          for (const Slice& slice : shares[t]) work(slice, out ? sums[used]->data : nullptr);
        used += !shares[t].empty();
      }
    }
#pragma omp barrier
    const int64_t me = omp_get_thread_num(), lines = (size + 15) / 16;
    if (out) add_up(sums, lines * me / team * 16, std::min(size, lines * (me + 1) / team * 16), out);
  }
  return true;
}

// Backward --------------------------------------------------------------------------------------------------------

// What one group's backward pass needs beside the blocks themselves; `pairs` is the group's size rounded up.
template <class T>
struct Buffers {
  T* grad_y;        // right panels of the gradient of y
  T* grad_y_left;   // the same as left rows
  T* inputs;        // inputs, neighbouring pairs in one word
  T* hidden;        // weighted hidden values, neighbouring pairs in one word
  T* grad_up;       // gradient of `up`, as right panels
  T* grad_up_left;  // the same as left rows
  T* packed;
  float* c;
  float* weight_grads;  // sums over groups, for experts of several
};

// Gradient of one hidden row to the gradients of the rows of `up` that made it; returns the weighted hidden values.
struct Gradients {
  Vec hidden, grad_gate, grad_value;
};
Gradients differentiate(const Problem& p, Vec grad, Vec gate, Vec value, Vec weight, Vec& grad_weight) {
  Vec slope, active = apply(p.function, gate, slope);
  Vec hidden = p.gated ? _mm512_mul_ps(active, value) : active;
  grad_weight = _mm512_fmadd_ps(grad, hidden, grad_weight);
  grad = _mm512_mul_ps(grad, weight);
  Vec inner = p.gated ? _mm512_mul_ps(grad, value) : grad;
  return {_mm512_mul_ps(hidden, weight), _mm512_mul_ps(inner, slope), _mm512_mul_ps(grad, active)};
}

// 16 hidden rows of 16 pairs (columns) to words that pair columns: rows of the right operand of a weight gradient.
void put_columns(bf16* out, int64_t panel_words, int c, int64_t f, const Vec rows[2][16]) {
  if (c) return;  // both halves at once: 32 columns are 16 words
  Words square[16];
  for (int i = 0; i < 16; i++)
    square[i] = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(rows[0][i])), narrow(rows[1][i]), 1);
  transpose(square);
  uint32_t* words = reinterpret_cast<uint32_t*>(out) + f / SIDE * panel_words + f % SIDE;
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(words + i * SIDE, square[i]);
}
void put_columns(float* out, int64_t panel_words, int c, int64_t f, const Vec rows[2][16]) {
  Words square[16];
  for (int i = 0; i < 16; i++) square[i] = _mm512_castps_si512(rows[c][i]);
  transpose(square);
  float* words = out + f / SIDE * panel_words + f % SIDE;
  for (int i = 0; i < 16; i++) _mm512_storeu_ps(words + (16 * c + i) * SIDE, _mm512_castsi512_ps(square[i]));
}

void put_left(bf16* left, int64_t row, int c, Vec x) { store(left + row * SIDE + 16 * c, x); }
void put_left(float*, int64_t, int, Vec) {}  // float32's right panels serve as left rows

// 16 rows of one block of hidden gradients.
template <class T>
void backward_rows(const Layer<T>& l, const Slice& s, const Group& g, int panel, int64_t f, const float* c,
                   const Buffers<T>& b, Vec grad_weight[2]) {
  const Problem& p = l.p;
  constexpr int per = Kind<T>::per_word;
  const int64_t depth = round_up(s.f1 - s.f0, SIDE), rows = p.gated ? 2 * depth : depth, local = f - s.f0;
  T* grad_up = b.grad_up + panel * rows * SIDE;
  T* grad_up_left = b.grad_up_left + panel * rows * SIDE;
  Vec weight[2], hidden[2][16];
  weights_of(p, g, panel, weight);
  for (int h = 0; h < 2; h++) {
    const int64_t at = int64_t(panel) * SIDE + 16 * h;
    const __mmask16 mask = first16(g.count - at);
    for (int i = 0; i < 16; i += 2) {
      Gradients grads[2];
      for (int j = 0; j < 2; j++) {
        const bool exists = f + i + j < l.F;
        Vec gate = exists ? load(l.kept(s.expert, f + i + j, g.first + at), mask) : Vec{};
        Vec value = exists && p.gated ? load(l.kept(s.expert, l.F + f + i + j, g.first + at), mask) : Vec{};
        Vec grad = _mm512_loadu_ps(c + (i + j) * SIDE + 16 * h);
        grads[j] = differentiate(p, grad, gate, value, weight[h], grad_weight[h]);
        hidden[h][i + j] = grads[j].hidden;
        put_left(grad_up_left, local + i + j, h, grads[j].grad_gate);
        if (p.gated) put_left(grad_up_left, depth + local + i + j, h, grads[j].grad_value);
      }
      put_pair(grad_up, local + i, h, grads[0].grad_gate, grads[1].grad_gate);
      if (p.gated) put_pair(grad_up, depth + local + i, h, grads[0].grad_value, grads[1].grad_value);
    }
  }
  const int64_t panel_words = int64_t(g.panels) * BLOCK / per;
  for (int h = 0; h < 2; h++) put_columns(b.hidden + int64_t(panel) * BLOCK, panel_words, h, local, hidden);
}

// Write a block of a weight gradient: rows from `row`, columns from `column`, as far as the matrix goes.
template <class T>
void put_block(const float* c, T* matrix, int64_t stride, int64_t rows, int64_t columns) {
  for (int i = 0; i < std::min<int64_t>(rows, SIDE); i++)
    for (int h = 0; h < 2; h++)
      store(matrix + i * stride + 16 * h, load(c + i * SIDE + 16 * h), first16(columns - 16 * h));
}

// One row of blocks of a weight gradient: left rows (of tokens) times all right panels.
template <class T, class Put>
void weight_gradient(const Left<T>& left, const Right& right, int panels, int steps, float* c, bool first, bool last,
                     Put&& put) {
  product(left, right, panels, steps, c, !first);
  if (!last) return;
  for (int i = 0; i < panels; i++) put(c + i * BLOCK, i);
}

template <class T>
Left<T> columns_of(const Layer<T>& l, const T* from, int64_t stride, int64_t depth, int64_t count, T* packed) {
  if constexpr (Kind<T>::per_word == 1)
    if (l.aligned) return {{from, from + 16}, 1, SIDE * stride, stride};
  return pack_columns(from, stride, depth, count, packed);
}

template <class T>
void gather_group(const Layer<T>& l, const Group& g, const Buffers<T>& b) {
  const Problem& p = l.p;
  const int64_t Dp = l.Dp, panel_words = int64_t(g.panels) * BLOCK / Kind<T>::per_word;
  for (int i = 0; i < g.panels; i++) {
    const T* rows[SIDE];
    rows_of(p, g, i, static_cast<const T*>(p.grad_y), l.D, rows);
    auto* panel = reinterpret_cast<uint32_t*>(b.grad_y + i * Dp * SIDE);
    transpose_panel(rows, l.D, panel);
    if (p.grad_down) left_rows(panel, Dp, b.grad_y_left + i * Dp * SIDE);
    if (!p.grad_up) continue;
    rows_of(p, g, i, static_cast<const T*>(p.x), l.D, rows);
    pair_rows(rows, l.D, reinterpret_cast<uint32_t*>(b.inputs) + i * (BLOCK / Kind<T>::per_word), panel_words);
  }
}

template <class T>
void backward_slice(const Layer<T>& l, const Slice& s, float* sum, float* grad_weight) {
  const Problem& p = l.p;
  constexpr int per = Kind<T>::per_word;
  const int64_t D = l.D, F = l.F, Dp = l.Dp, depth = round_up(s.f1 - s.f0, SIDE), rows = p.gated ? 2 * depth : depth;
  const int64_t most = l.group() / SIDE, wide = std::max<int64_t>(most, std::max(Dp, depth) / SIDE);
  const bool several = l.load(s.expert) > l.group();
  const size_t values = most * SIDE * (3 * Dp + depth + 2 * rows) + SIDE * (Dp + rows);
  const size_t floats = wide * BLOCK + (several ? Dp * (depth + rows) : 0);
  scratch.reserve(values * sizeof(T) + floats * 4 + 8192);
  Buffers<T> b;
  b.grad_y = scratch.take<T>(most * SIDE * Dp);
  b.grad_y_left = per == 1 ? b.grad_y : scratch.take<T>(most * SIDE * Dp);
  b.inputs = scratch.take<T>(most * SIDE * Dp);
  b.hidden = scratch.take<T>(most * SIDE * depth);
  b.grad_up = scratch.take<T>(most * SIDE * rows);
  b.grad_up_left = per == 1 ? b.grad_up : scratch.take<T>(most * SIDE * rows);
  b.packed = scratch.take<T>(SIDE * (Dp + rows));
  b.c = scratch.take<float>(wide * BLOCK);
  b.weight_grads = scratch.take<float>(several ? Dp * (depth + rows) : 0);
  const T *up = l.up(s.expert), *down = l.down(s.expert);
  T* grad_up = p.grad_up ? static_cast<T*>(p.grad_up) + s.expert * l.H * D : nullptr;
  T* grad_down = p.grad_down ? static_cast<T*>(p.grad_down) + s.expert * D * F : nullptr;
  for_groups(l, s.expert, [&](const Group& g, bool first, bool last) {
    gather_group(l, g, b);
    std::vector<Vec> weight_sums(2 * g.panels, Vec{});
    for (int64_t f = s.f0; f < s.f0 + depth; f += SIDE) {
      Left<T> left = columns_of(l, down + f, F, D, F - f, b.packed);
      product(left, panels_of(b.grad_y, Dp), g.panels, Dp / SIDE, b.c);
      for (int i = 0; i < g.panels; i++)
        for (int h = 0; h < 2; h++)
          backward_rows(l, s, g, i, f + 16 * h, b.c + i * BLOCK + h * 16 * SIDE, b, &weight_sums[2 * i]);
    }
    if (grad_weight)
      for (int i = 0; i < 2 * g.panels; i++)
        store(grad_weight + g.first - p.offsets[s.expert] + 16 * i, weight_sums[i], first16(g.count - 16 * i));
    const int64_t pairs = int64_t(g.panels) * SIDE;
    float* c = several ? b.weight_grads : b.c;
    if (grad_down)
      for (int64_t d = 0; d < D; d += SIDE) {
        const T* at = b.grad_y_left + d * SIDE;
        weight_gradient(Left<T>{{at, at + 16 * SIDE}, SIDE, Dp * SIDE}, panels_of(b.hidden, pairs), depth / SIDE,
                        g.panels, c, first, last, [&](const float* block, int i) {
                          int64_t f = s.f0 + i * SIDE;
                          put_block(block, grad_down + d * F + f, F, D - d, F - f);
                        });
        if (several) c += depth * SIDE;
      }
    if (grad_up)
      for (int64_t r = 0; r < rows; r += SIDE) {
        const T* at = b.grad_up_left + r * SIDE;
        const int64_t f = s.f0 + r % depth, row = r < depth ? f : F + f;
        weight_gradient(Left<T>{{at, at + 16 * SIDE}, SIDE, rows * SIDE}, panels_of(b.inputs, pairs), Dp / SIDE,
                        g.panels, c, first, last, [&](const float* block, int i) {
                          put_block(block, grad_up + row * D + i * SIDE, D, F - f, D - i * SIDE);
                        });
        if (several) c += Dp * SIDE;
      }
    if (!sum) return;
    for (int64_t d = 0; d < D; d += SIDE) {
      const Right panels = panels_of(b.grad_up, rows);
      for (int part = 0; part < (p.gated ? 2 : 1); part++) {
        Left<T> left = columns_of(l, up + (part * F + s.f0) * D + d, D, s.f1 - s.f0, D - d, b.packed);
        Right right = panels;
        right.words += part * depth * SIDE / per;
        product(left, right, g.panels, depth / SIDE, b.c, part > 0);
      }
      for (int i = 0; i < g.panels; i++) {
        float* to[SIDE];
        rows_of(p, g, i, sum, D, to);
        add_columns(b.c + i * BLOCK, to, d, D);
      }
    }
  });
}

template <class T>
int forward(const Problem& p) {
  const Layer<T> l(p);
  large_pages(p.kept, l.kept_at[p.experts] * l.H * sizeof(T));
  large_pages(p.y, p.tokens * p.width * sizeof(T));
  return run_shares(p, static_cast<T*>(p.y), [&](const Slice& s, float* sum) { forward_slice(l, s, sum); });
}

// Gradients of the routing weights that a slice of an expert contributes.
struct Part {
  Slice slice;
  std::vector<float> grad;
};

template <class T>
int backward(const Problem& p) {
  const Layer<T> l(p);
  large_pages(p.grad_up, p.experts * l.H * l.D * sizeof(T));
  large_pages(p.grad_down, p.experts * l.F * l.D * sizeof(T));
  std::vector<Part> parts;
  for (const auto& slices : share(p))
    for (const Slice& s : slices) parts.push_back({s, std::vector<float>(p.grad_weight ? l.load(s.expert) : 0)});
  auto part_of = [&](const Slice& s) -> float* {
    for (Part& part : parts)
      if (part.slice.expert == s.expert && part.slice.f0 == s.f0) return part.grad.data();
    return nullptr;
  };
  bool done = run_shares(p, static_cast<T*>(p.grad_x), [&](const Slice& s, float* sum) {
    backward_slice(l, s, sum, p.grad_weight ? part_of(s) : nullptr);
  });
  if (!done) return false;
  if (p.grad_weight) {
    std::fill_n(p.grad_weight, p.offsets[p.experts], 0.0f);
    for (const Part& part : parts)
      for (size_t i = 0; i < part.grad.size(); i++) p.grad_weight[p.offsets[part.slice.expert] + i] += part.grad[i];
  }
#pragma omp parallel for num_threads(p.threads)
  for (int64_t e = 0; e < p.experts; e++) {
    if (l.load(e)) continue;
    if (p.grad_up) std::memset(static_cast<T*>(p.grad_up) + e * l.H * l.D, 0, l.H * l.D * sizeof(T));
    if (p.grad_down) std::memset(static_cast<T*>(p.grad_down) + e * l.D * l.F, 0, l.D * l.F * sizeof(T));
  }
  return true;
}

}  // namespace

extern "C" {

// 1 if bfloat16 can be multiplied on this processor's matrix unit.
int crossways_matrix_unit() { return matrix_unit(); }

// Elements that `kept` must hold.
int64_t crossways_kept_size(const Problem* p) {
  int64_t columns = 0;
  for (int64_t e = 0; e < p->experts; e++) columns += round_up(p->offsets[e + 1] - p->offsets[e], SIDE);
  return columns * p->expert_width * (p->gated ? 2 : 1);
}

// Both return 1, or 0 when memory ran out. `half` is 1 for bfloat16, 0 for float32.
int crossways_experts_forward(const Problem* p, int half) { return half ? forward<bf16>(*p) : forward<float>(*p); }
int crossways_experts_backward(const Problem* p, int half) { return half ? backward<bf16>(*p) : backward<float>(*p); }
}
