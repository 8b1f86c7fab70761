// Expert compute for the CPU: y[t] = sum over t's pairs of weight * down_e(f(up_e(x[t]))), and its gradients.
//
// Tokens are the columns of every product, so weights are the left operand and are read where they lie, once for a
// whole group of tokens. What stands between the products happens on blocks of 32 x 32 that are still in the cache. A
// thread owns some rows of the hidden layer of some experts, hence their weight gradients; it adds its share of y, or
// of the gradient of x, to a sum of its own, and the sums are added up at the end, in the same order every time.
//
// Reading order: simd.h, operands.h, matrix_unit.h, vectors.h, few_rows.h, thin.h, product.h, rows.h, problem.h,
// activation.h, forward.h, transposed.h, backward.h, this.
#include "backward.h"

using namespace crossways;

namespace {

template <class T>
void forward(const Problem& p) {
  const Layer<T> l(p);
  large_pages(p.kept, l.kept_at[p.experts] * l.H * sizeof(T));
  large_pages(p.y, p.tokens * p.width * sizeof(T));
  with_function(p.function, [&](auto function) {
    run_shares(p, static_cast<T*>(p.y), [&](const Slice& s, const Slice*, float* sum) {
      if (p.gated)
        forward_slice<T, function(), true>(l, s, sum);
      else
        forward_slice<T, function(), false>(l, s, sum);
    });
  });
}

// What each slice adds to the gradients of its expert's routing weights; slices of one expert are neighbours.
struct Parts {
  std::vector<Slice> slices;
  std::vector<std::vector<float>> grads;
  template <class T>
  explicit Parts(const Layer<T>& l) {
    for (const auto& shares : share(l.p))
      for (const Slice& s : shares) {
        slices.push_back(s);
        grads.emplace_back(l.p.grad_weight ? l.load(s.expert) : 0);
      }
  }
  float* of(const Slice& s) {
    auto before = [](const Slice& a, const Slice& b) { return std::tie(a.expert, a.f0) < std::tie(b.expert, b.f0); };
    return grads[std::lower_bound(slices.begin(), slices.end(), s, before) - slices.begin()].data();
  }
  void add_up(const Problem& p) const {
    std::fill_n(p.grad_weight, p.offsets[p.experts], 0.0f);
    for (size_t i = 0; i < slices.size(); i++)
      for (size_t j = 0; j < grads[i].size(); j++) p.grad_weight[p.offsets[slices[i].expert] + j] += grads[i][j];
  }
};

template <class T>
void backward(const Problem& p) {
  const Layer<T> l(p, BACKWARD_BYTES);
  large_pages(p.grad_up, p.experts * l.H * l.D * sizeof(T));
  large_pages(p.grad_down, p.experts * l.F * l.D * sizeof(T));
  Parts parts(l);
  with_function(p.function, [&](auto function) {
    run_shares(p, static_cast<T*>(p.grad_x), [&](const Slice& s, const Slice* next, float* sum) {
      float* grad_weight = p.grad_weight ? parts.of(s) : nullptr;
      if (p.gated)
        backward_slice<T, function(), true>(l, s, next, sum, grad_weight);
      else
        backward_slice<T, function(), false>(l, s, next, sum, grad_weight);
    });
  });
  if (p.grad_weight) parts.add_up(p);
#pragma omp parallel for num_threads(p.threads)
  for (int64_t e = 0; e < p.experts; e++) {
    if (l.load(e)) continue;
    if (p.grad_up) std::memset(static_cast<T*>(p.grad_up) + e * l.H * l.D, 0, l.H * l.D * sizeof(T));
    if (p.grad_down) std::memset(static_cast<T*>(p.grad_down) + e * l.D * l.F, 0, l.D * l.F * sizeof(T));
  }
}

}  // namespace

extern "C" {

// 1 if bfloat16 can be multiplied on this processor's matrix unit.
int crossways_matrix_unit() { return matrix_unit(); }

// Whether every pair is of an existing token, and the offsets go from 0 to at most `pairs` without a step back.
int crossways_valid(const Problem* p, int64_t pairs) {
  bool valid = p->offsets[0] == 0 && p->offsets[p->experts] <= pairs;
  for (int64_t e = 0; e < p->experts; e++) valid &= p->offsets[e] <= p->offsets[e + 1];
  uint64_t last = 0;  // a negative token is a very large one
  for (int64_t i = 0; i < pairs; i++) last = std::max(last, uint64_t(p->token[i]));
  return valid && (pairs == 0 || last < uint64_t(p->tokens));
}

// `half` is 1 for bfloat16, 0 for float32.
void crossways_experts_forward(const Problem* p, int half) { half ? forward<bf16>(*p) : forward<float>(*p); }
void crossways_experts_backward(const Problem* p, int half) { half ? backward<bf16>(*p) : backward<float>(*p); }
}
