// The forward pass for few tokens, such as a step of generation. The limit is reading the weights, so each is read
// once, where it lies, in any width, and multiplied by all tokens of its expert. First all hidden values, then, after a
// barrier, all outputs: each is made by one thread, so the sum does not depend on their number.
//
// Legend: T tokens, P pairs sorted by expert, E experts, D model width, F expert width, H rows of the first matrix.
#include "activation.h"
#include "few_rows.h"
#include "settle.h"

using namespace crossways;

namespace {

// Up to how many tokens, and how many of them an expert has on average, reading the weights is the limit. In bfloat16
// the matrix unit takes over earlier than vectors do in float32.
constexpr int64_t FEW_TOKENS = 64, FEW_OF_AN_EXPERT = 20, FEW_OF_AN_EXPERT_IN_HALF = 3;
constexpr int64_t BLOCK_OF_FEW = 16;  // hidden values, or outputs, that are one thread's

// In which part of [0, n) thread `me` of `team` begins, in whole blocks.
inline int64_t share(int64_t n, int64_t me, int64_t team) {
  const int64_t blocks = (n + BLOCK_OF_FEW - 1) / BLOCK_OF_FEW;
  return std::min(n, blocks * me / team * BLOCK_OF_FEW);
}

template <class T>
struct Few {
  const Layer<T> l;
  const Problem& p = l.p;
  const int64_t D = l.D, F = l.F, H = l.H, stride = round_up(F, 16);
  std::vector<int64_t> busy;  // experts that have a token
  const float* x;             // (T, D)
  float *hidden, *value;      // (P, stride)
  float* sum;                 // (T, D)

  explicit Few(const Problem& problem) : l(problem) {
    for (int64_t e = 0; e < p.experts; e++)
      if (load(e)) busy.push_back(e);
    const int64_t pairs = p.offsets[p.experts], size = p.tokens * D;
    scratch.reserve((2 * pairs * stride + 2 * size) * sizeof(float) + 256);
    hidden = scratch.take<float>(pairs * stride);
    value = scratch.take<float>(pairs * stride);
    sum = scratch.take<float>(size);
    x = as_float(static_cast<const T*>(p.x), size);
  }
  static const float* as_float(const float* from, int64_t) { return from; }
  static const float* as_float(const bf16* from, int64_t size) {
    float* to = scratch.take<float>(size);
    for (int64_t i = 0; i < size; i += 16) store(to + i, crossways::load(from + i, first16(size - i)), first16(size - i));
    return to;
  }

  int64_t load(int64_t e) const { return p.offsets[e + 1] - p.offsets[e]; }
  // Time that a hidden value takes: that of reading its weights, unless many tokens are multiplied by them.
  int64_t cost(int64_t e) const { return std::max<int64_t>(load(e), 20); }

  // Call run(e, f0, f1) for the hidden values of each expert that are the share of thread `me` of `team`.
  template <class Run>
  void for_share(int64_t me, int64_t team, Run&& run) const {
    const int64_t blocks = (F + BLOCK_OF_FEW - 1) / BLOCK_OF_FEW;
    int64_t total = 0, before = 0;
    for (int64_t e : busy) total += cost(e) * blocks;
    // A block belongs to the thread in whose share it begins.
    auto from = [&](int64_t e, int64_t thread) {
      const int64_t left = total * thread / team - before;
      return std::min(F, std::clamp<int64_t>((left + cost(e) - 1) / cost(e), 0, blocks) * BLOCK_OF_FEW);
    };
    for (int64_t e : busy) {
      const int64_t first = from(e, me), last = from(e, me + 1);
      if (first < last) run(e, first, last);
      before += cost(e) * blocks;
    }
  }

  // Call run(first pair, number of pairs) for all pairs of an expert. More than MANY read its weights again.
  template <class Run>
  void for_pairs(int64_t e, Run&& run) const {
    for (int64_t at = p.offsets[e]; at < p.offsets[e + 1]; at += MANY)
      run(at, std::min<int64_t>(MANY, p.offsets[e + 1] - at));
  }

  // Hidden values [f0, f1) of an expert.
  template <Function function>
  void hide(int64_t e, int64_t f0, int64_t f1) const {
    const T* up = static_cast<const T*>(p.up) + (e * H + f0) * D;
    for_pairs(e, [&](int64_t pair, int64_t n) {
      Columns gates, values;
      for (int64_t i = 0; i < n; i++) {
        gates.x[i] = values.x[i] = x + p.token[pair + i] * D;
        gates.out[i] = hidden + (pair + i) * stride + f0;
        values.out[i] = value + (pair + i) * stride + f0;
        std::fill_n(gates.out[i], f1 - f0, 0.0f);
        if (p.gated) std::fill_n(values.out[i], f1 - f0, 0.0f);
      }
      multiply(up, f1 - f0, D, gates, n);
      if (p.gated) multiply(up + F * D, f1 - f0, D, values, n);
      for (int64_t i = 0; p.kept && i < n; i++) {
        keep(e, f0, f1, pair + i, gates.out[i]);
        if (p.gated) keep(e, F + f0, F + f1, pair + i, values.out[i]);
      }
      for (int64_t i = 0; i < n; i++) activate<function>(gates.out[i], values.out[i], p.weight[pair + i], f1 - f0);
    });
  }
  // Rows [h0, h1) of what `up` returned for a pair, for backward.
  void keep(int64_t e, int64_t h0, int64_t h1, int64_t pair, const float* from) const {
    const int64_t in_panel = (pair - p.offsets[e]) % SIDE;
    T* to = l.kept(e, h0, pair - in_panel) + in_panel;
    for (int64_t h = 0; h < h1 - h0; h++) store(to + h * SIDE, _mm512_set1_ps(from[h]), 1);
  }
  template <Function function>
  void activate(float* gate, const float* value, float weight, int64_t count) const {
    for (int64_t f = 0; f < count; f += 16) {
      const __mmask16 mask = first16(count - f);
      Vec out = _mm512_mul_ps(apply<function>(crossways::load(gate + f, mask)), _mm512_set1_ps(weight));
      if (p.gated) out = _mm512_mul_ps(out, crossways::load(value + f, mask));
      store(gate + f, out, mask);
    }
  }

  // Outputs [d0, d1) of all tokens.
  void put(int64_t d0, int64_t d1) const {
    for (int64_t t = 0; t < p.tokens; t++) std::fill(sum + t * D + d0, sum + t * D + d1, 0.0f);
    for (int64_t e : busy)
      for_pairs(e, [&](int64_t pair, int64_t n) {
        Columns columns;
        for (int64_t i = 0; i < n; i++) {
          columns.x[i] = hidden + (pair + i) * stride;
          columns.out[i] = sum + p.token[pair + i] * D + d0;
        }
        multiply(static_cast<const T*>(p.down) + (e * D + d0) * F, d1 - d0, F, columns, n);
      });
    for (int64_t t = 0; t < p.tokens; t++)
      for (int64_t d = d0; d < d1; d += 16) {
        const __mmask16 mask = first16(d1 - d);
        store(static_cast<T*>(p.y) + t * D + d, crossways::load(sum + t * D + d, mask), mask);
      }
  }

  template <Function function>
  void run() const {
#pragma omp parallel num_threads(p.threads)
    {
      const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      for_share(me, team, [&](int64_t e, int64_t f0, int64_t f1) { hide<function>(e, f0, f1); });
#pragma omp barrier
      put(share(D, me, team), share(D, me + 1, team));
    }
  }
};

template <class T>
void forward(const Problem& p) {
  const Few<T> few(p);
  with_function(p.function, [&](auto function) { few.template run<function()>(); });
}

}  // namespace

extern "C" {

// Whether `crossways_experts_few` is faster than what works on many tokens. `half` is 1 for bfloat16, 0 for float32.
int crossways_few(const Problem* p, int half) {
  int64_t busy = 0;
  for (int64_t e = 0; e < p->experts; e++) busy += p->offsets[e + 1] > p->offsets[e];
  const int64_t most = half ? FEW_OF_AN_EXPERT_IN_HALF : FEW_OF_AN_EXPERT;
  return p->tokens <= FEW_TOKENS && p->offsets[p->experts] <= most * busy;
}

void crossways_experts_few(const Problem* p, int half) {
  const Settled settled(*p, half);
  half ? forward<bf16>(*p) : forward<float>(*p);
}
}
