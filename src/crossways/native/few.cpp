// Expert compute for few tokens, forward only: a step of generation. The limit is reading the weights, so each is read
// once, where it lies, in any width, and multiplied by all tokens of its expert. First all hidden values, then, after a
// barrier, all outputs: each is made by one thread, so the sum does not depend on their number.
//
// Reading order: few.h, few_vectors.h (float32), few_tiles.h (bfloat16), this.
#include "few_vectors.h"

using namespace crossways;

namespace {

template <class Kernel, Function function>
void run(const Problem& p) {
  const Kernel few(p);
  const int64_t side = Kernel::SIDE_OF_PUT, blocks = (few.D + side - 1) / side;
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    few.for_share(me, team, [&](int64_t e, int64_t b0, int64_t b1) { few.template hide<function>(e, b0, b1); });
#pragma omp barrier
    const int64_t b0 = blocks * me / team, b1 = blocks * (me + 1) / team;
    const int64_t d0 = b0 * side, d1 = std::min(few.D, b1 * side);
    few.clear(d0, d1);
    for (int64_t e : few.busy) few.put(e, b0, b1);
    few.template write<typename Kernel::Value>(d0, d1);
  }
}

template <class Kernel>
void forward(const Problem& p) {
  with_function(p.function, [&](auto function) { run<Kernel, function()>(p); });
}

}  // namespace

extern "C" {

// `half` is 1 for bfloat16, 0 for float32. Nothing is kept for a backward pass.
void crossways_experts_few(const Problem* p, int half) { forward<FewVectors>(*p); }
}
