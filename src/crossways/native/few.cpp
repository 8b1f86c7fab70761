// The forward pass for few tokens, such as a step of generation. The limit is reading the weights, so each is read
// once, where it lies, in any width, and multiplied by all tokens of its expert: on vectors, in float32, here, and in
// bfloat16, where experts have several tokens, on the matrix unit (few_tiled.h).
//
// Legend: T tokens, P pairs sorted by expert, E experts, D model width, F expert width, H rows of the first matrix.
#include "few_tiled.h"

using namespace crossways;

namespace {

// Up to how many tokens, and how many of them an expert has on average, reading the weights is the limit. In bfloat16
// vectors keep up with it for fewer, and the matrix unit then takes over, for any number.
constexpr int64_t FEW_TOKENS = 64, FEW_OF_AN_EXPERT = 20, FEW_OF_AN_EXPERT_IN_HALF = 3;

template <class T>
struct Few : FewLayer<T> {
  using Layer = FewLayer<T>;
  using Layer::D, Layer::F, Layer::H, Layer::l, Layer::p, Layer::sum, Layer::for_pairs;
  const int64_t stride = round_up(F, 16);
  const float* x;          // (T, D)
  float *hidden, *value;   // (P, stride)

  explicit Few(const Problem& problem) : Layer(problem) {
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

  // Time that a hidden value takes: that of reading its weights, unless many tokens are multiplied by them.
  int64_t cost(int64_t e) const { return std::max<int64_t>(l.load(e), 20); }

  // Hidden values [f0, f1) of an expert.
  template <Function function>
  void hide(int64_t e, int64_t f0, int64_t f1) const {
    const T* up = l.up(e) + f0 * D;
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

  // Add outputs [d0, d1) of an expert's pairs to `sum`.
  void add(int64_t e, int64_t pair, int64_t n, int64_t d0, int64_t d1) const {
    Columns columns;
    for (int64_t i = 0; i < n; i++) {
      columns.x[i] = hidden + (pair + i) * stride;
      columns.out[i] = sum + p.token[pair + i] * D + d0;
    }
    multiply(l.down(e) + d0 * F, d1 - d0, F, columns, n);
  }

  template <Function function>
  void run() const {
#pragma omp parallel num_threads(p.threads)
    {
      const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      this->for_share(me, team, [&](int64_t e) { return cost(e); },
                      [&](int64_t e, int64_t f0, int64_t f1) { hide<function>(e, f0, f1); });
#pragma omp barrier
      const int64_t d0 = share_of_few(D, me, team), d1 = share_of_few(D, me + 1, team);
      this->put(d0, d1, [&](int64_t e, int64_t pair, int64_t n) { add(e, pair, n, d0, d1); });
    }
  }
};

// Whether vectors keep up with reading when each expert that has a token has as many as these have on average.
bool few_of_each(const Problem& p, int64_t most) {
  int64_t busy = 0;
  for (int64_t e = 0; e < p.experts; e++) busy += p.offsets[e + 1] > p.offsets[e];
  return p.offsets[p.experts] <= most * busy;
}

template <class Kernel>
void forward(const Problem& p) {
  const Kernel kernel(p);
  with_function(p.function, [&](auto function) { kernel.template run<function()>(); });
}

}  // namespace

extern "C" {

// Whether `crossways_experts_few` is faster than what works on many tokens. `half` is 1 for bfloat16, 0 for float32.
int crossways_few(const Problem* p, int half) {
  return p->tokens <= FEW_TOKENS && (half || few_of_each(*p, FEW_OF_AN_EXPERT));
}

void crossways_experts_few(const Problem* p, int half) {
  if (!half) return forward<Few<float>>(*p);
  few_of_each(*p, FEW_OF_AN_EXPERT_IN_HALF) ? forward<Few<bf16>>(*p) : forward<TiledFew>(*p);
}
}
