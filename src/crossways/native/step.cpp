// A forward pass in one call. In a step of generation every detour through Python counts, so this decides what Python
// would otherwise ask for: whether the pairs are valid, what their weights are as floats, and which kernel takes them.
//
// Legend: T tokens, P pairs sorted by expert, E experts, D model width, F expert width, H rows of the first matrix.
#include "settle.h"

using namespace crossways;

extern "C" {

int crossways_valid(const Problem*, int64_t pairs);
int crossways_few(const Problem*, int half);
void crossways_experts_few(const Problem*, int half);
void crossways_experts_forward(const Problem*, int half);

// `half` and `half_weight` are 1 for bfloat16, 0 for float32; `kept` may be null. Returns 1 if few tokens' kernel ran, 2
// if the other did, and 0, with nothing done, if the pairs are not valid.
int crossways_experts_pass(const void* x, const void* up, const void* down, const void* weight, const int64_t* token,
                           const int64_t* offsets, void* kept, void* y, int64_t tokens, int64_t experts, int64_t pairs,
                           int64_t width, int64_t expert_width, int64_t gated, int64_t function, int64_t half,
                           int64_t half_weight, int64_t threads) {
  Problem p{};
  p.tokens = tokens, p.experts = experts, p.width = width, p.expert_width = expert_width;
  p.gated = gated, p.function = function, p.threads = threads;
  p.token = token, p.offsets = offsets, p.x = x, p.up = up, p.down = down, p.kept = kept, p.y = y;
  if (!crossways_valid(&p, pairs)) return 0;
  std::vector<float> wide(half_weight ? pairs : 0);
  const auto* narrow = static_cast<const bf16*>(weight);
  for (int64_t i = 0; i < int64_t(wide.size()); i += 16)
    store(wide.data() + i, load(narrow + i, first16(pairs - i)), first16(pairs - i));
  p.weight = half_weight ? wide.data() : static_cast<const float*>(weight);
  const Settled settled(p, half);
  const bool few = crossways_few(&p, half);
  (few ? crossways_experts_few : crossways_experts_forward)(&p, half);
  return few ? 1 : 2;
}
}
