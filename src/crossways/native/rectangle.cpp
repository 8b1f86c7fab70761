// Pairs sorted by expert to the rectangular form of routing: for each token, places that hold an expert or nobody.
//
// Legend: T tokens, P pairs, E experts, K places of a token.
#include <algorithm>
#include <cstdint>
#include <vector>

extern "C" {

// place[i] = how many earlier pairs pair i's token has; returns the most pairs of any token.
int64_t crossways_places(const int64_t* token, int64_t pairs, int64_t tokens, int64_t* place) {
  std::vector<int64_t> count(tokens);
  int64_t most = 0;
  for (int64_t i = 0; i < pairs; i++) {
    place[i] = count[token[i]]++;
    most = std::max(most, place[i] + 1);
  }
  return most;
}

// index[t] (k places) = the experts of token t, then `nobody`; place[i] becomes where pair i lies in all of them. With
// weights of the pairs given, `filled` gets them in their places and zeros elsewhere.
void crossways_fill_places(const int64_t* token, const int64_t* expert, const float* weight, int64_t pairs,
                           int64_t tokens, int64_t k, int64_t nobody, int64_t* place, int64_t* index, float* filled) {
  std::fill_n(index, tokens * k, nobody);
  if (weight) std::fill_n(filled, tokens * k, 0.0f);
  for (int64_t i = 0; i < pairs; i++) {
    place[i] += token[i] * k;
    index[place[i]] = expert[i];
    if (weight) filled[place[i]] = weight[i];
  }
}
}
