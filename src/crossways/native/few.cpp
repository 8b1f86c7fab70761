// Expert compute for few tokens, forward only: a step of generation. The limit is reading the weights, so each is read
// once, row after row where it lies, in any width, and multiplied by the tokens of its expert. First all hidden values,
// then, after a barrier, all outputs: each is made by one thread, so the sum does not depend on their number.
//
// Legend: T tokens, P pairs sorted by expert, D model width, F expert width, H rows of the first matrix.
#include "activation.h"
#include "problem.h"

using namespace crossways;

namespace {

constexpr int TOKENS = 4;  // of one expert at a time
constexpr int ROWS = 16;   // hidden values that make a vector

// sum[i] = row times vector i, for n vectors of `width` values.
template <int n, class T>
inline void dots(const T* row, const float* const* x, int64_t width, float* sum) {
  Vec even[n] = {}, odd[n] = {};
  int64_t k = 0;
  for (; k + 32 <= width; k += 32) {
    const Vec a = load(row + k), b = load(row + k + 16);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) {
      even[i] = _mm512_fmadd_ps(a, _mm512_loadu_ps(x[i] + k), even[i]);
      odd[i] = _mm512_fmadd_ps(b, _mm512_loadu_ps(x[i] + k + 16), odd[i]);
    }
  }
  for (; k < width; k += 16) {
    const __mmask16 mask = first16(width - k);
    const Vec a = load(row + k, mask);
#pragma GCC unroll 4
    for (int i = 0; i < n; i++) even[i] = _mm512_fmadd_ps(a, load(x[i] + k, mask), even[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < n; i++) sum[i] = _mm512_reduce_add_ps(_mm512_add_ps(even[i], odd[i]));
}
template <class T>
inline void dots(const T* row, const float* const* x, int64_t width, int64_t n, float* sum) {
  if (n == 1) return dots<1>(row, x, width, sum);
  if (n == 2) return dots<2>(row, x, width, sum);
  if (n == 3) return dots<3>(row, x, width, sum);
  dots<4>(row, x, width, sum);
}

// Where thread `me` of `team` begins in n equal pieces of work.
inline int64_t share(int64_t n, int64_t me, int64_t team) { return n * me / team; }

template <class T>
struct Few {
  const Problem& p;
  const int64_t D = p.width, F = p.expert_width, H = p.gated ? 2 * F : F, blocks = (F + ROWS - 1) / ROWS;
  std::vector<int64_t> busy;          // experts that have a token
  std::vector<float> x, hidden, sum;  // (T, D) if x is not float already; (P, blocks * ROWS); (T, D)

  explicit Few(const Problem& problem) : p(problem) {
    for (int64_t e = 0; e < p.experts; e++)
      if (p.offsets[e + 1] > p.offsets[e]) busy.push_back(e);
    hidden.resize(p.offsets[p.experts] * blocks * ROWS);
    sum.resize(p.tokens * D);
    if (std::is_same_v<T, float>) return;
    x.resize(p.tokens * D);
    for (int64_t i = 0; i < p.tokens * D; i += 16)
      store(x.data() + i, load(static_cast<const T*>(p.x) + i, first16(p.tokens * D - i)), first16(p.tokens * D - i));
  }
  const float* token(int64_t pair) const {
    return (std::is_same_v<T, float> ? static_cast<const float*>(p.x) : x.data()) + p.token[pair] * D;
  }

  // Hidden values of 16 rows of an expert for all its pairs.
  template <Function function>
  void hide(int64_t e, int64_t block) {
    const T* up = static_cast<const T*>(p.up) + e * H * D;
    const int64_t first = block * ROWS, rows = std::min<int64_t>(ROWS, F - first);
    for (int64_t at = p.offsets[e]; at < p.offsets[e + 1]; at += TOKENS) {
      const int64_t n = std::min<int64_t>(TOKENS, p.offsets[e + 1] - at);
      const float* tokens[TOKENS];
      for (int64_t i = 0; i < n; i++) tokens[i] = token(at + i);
      alignas(64) float gate[TOKENS][ROWS] = {}, value[TOKENS][ROWS] = {};
      float sums[TOKENS];
      for (int64_t r = 0; r < rows; r++) {
        dots(up + (first + r) * D, tokens, D, n, sums);
        for (int64_t i = 0; i < n; i++) gate[i][r] = sums[i];
        if (!p.gated) continue;
        dots(up + (F + first + r) * D, tokens, D, n, sums);
        for (int64_t i = 0; i < n; i++) value[i][r] = sums[i];
      }
      for (int64_t i = 0; i < n; i++) {
        Vec out = _mm512_mul_ps(apply<function>(_mm512_load_ps(gate[i])), _mm512_set1_ps(p.weight[at + i]));
        if (p.gated) out = _mm512_mul_ps(out, _mm512_load_ps(value[i]));
        _mm512_storeu_ps(hidden.data() + ((at + i) * blocks + block) * ROWS, out);
      }
    }
  }

  // Outputs [d0, d1) of all tokens.
  void put(int64_t d0, int64_t d1) {
    for (int64_t e : busy) {
      const T* down = static_cast<const T*>(p.down) + e * D * F;
      for (int64_t at = p.offsets[e]; at < p.offsets[e + 1]; at += TOKENS) {
        const int64_t n = std::min<int64_t>(TOKENS, p.offsets[e + 1] - at);
        const float* hiddens[TOKENS];
        float sums[TOKENS];
        for (int64_t i = 0; i < n; i++) hiddens[i] = hidden.data() + (at + i) * blocks * ROWS;
        for (int64_t d = d0; d < d1; d++) {
          dots(down + d * F, hiddens, F, n, sums);
          for (int64_t i = 0; i < n; i++) sum[p.token[at + i] * D + d] += sums[i];
        }
      }
    }
    for (int64_t t = 0; t < p.tokens; t++)
      for (int64_t d = d0; d < d1; d += 16) {
        const __mmask16 mask = first16(d1 - d);
        store(static_cast<T*>(p.y) + t * D + d, load(sum.data() + t * D + d, mask), mask);
      }
  }

  template <Function function>
  void run() {
    const int64_t work = int64_t(busy.size()) * blocks;
#pragma omp parallel num_threads(p.threads)
    {
      const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      for (int64_t i = share(work, me, team); i < share(work, me + 1, team); i++)
        hide<function>(busy[i / blocks], i % blocks);
#pragma omp barrier
      put(share(D, me, team), share(D, me + 1, team));
    }
  }
};

template <class T>
void forward(const Problem& p) {
  Few<T> few(p);
  with_function(p.function, [&](auto function) { few.template run<function()>(); });
}

}  // namespace

extern "C" {

// `half` is 1 for bfloat16, 0 for float32. Nothing is kept for a backward pass.
void crossways_experts_few(const Problem* p, int half) { half ? forward<bf16>(*p) : forward<float>(*p); }
}
