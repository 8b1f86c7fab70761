// The decision for few tokens in one go: which pairs, what they weigh, in the order of experts.
//
// Legend: T tokens, E experts, K experts per token, C cutoffs (1 or E).
#include <cstdint>
#include <vector>

extern "C" {

// Chosen are the pairs that are not below their cutoff and that `allowed` allows (null allows all), or, with `k` above
// 0, those in index (T, K). Their weights are the scores, divided by the token's sum if `renormalize`, times `scale`.
// token, expert and weight have room for T E pairs.
void crossways_choose(const float* choice, const float* scores, const uint8_t* allowed, const float* cutoff,
                      int64_t cutoffs, const int64_t* index, int64_t k, int64_t tokens, int64_t experts, int64_t renormalize, float scale,
                      int64_t* token, int64_t* expert, float* weight, int64_t* offsets) {
  std::vector<uint8_t> chosen(tokens * experts);
  for (int64_t t = 0; t < tokens; t++) {
    const float* row = choice + t * experts;
    uint8_t* mine = chosen.data() + t * experts;
    for (int64_t e = 0; !k && e < experts; e++)
      mine[e] = !(row[e] < cutoff[cutoffs > 1 ? e : 0]) && (!allowed || allowed[t * experts + e]);
    for (int64_t i = 0; i < k; i++) mine[index[t * k + i]] = 1;
  }
  std::vector<float> sum(tokens);
  int64_t pairs = offsets[0] = 0;
  for (int64_t e = 0; e < experts; e++) {
    for (int64_t t = 0; t < tokens; t++) {
      if (!chosen[t * experts + e]) continue;
      token[pairs] = t;
      expert[pairs] = e;
      sum[t] += weight[pairs++] = scores[t * experts + e];
    }
    offsets[e + 1] = pairs;
  }
  for (int64_t i = 0; i < pairs; i++) {
    if (renormalize) weight[i] /= sum[token[i]];
    if (scale != 1.0f) weight[i] *= scale;
  }
}
}
