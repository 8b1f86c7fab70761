// Pairs sorted by expert to the rectangular form of routing, and back: for each token, places that hold an expert or
// nobody.
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

// Where each expert's pairs begin among the places that hold one below `experts`; returns 0 for a negative one.
int crossways_place_offsets(const int64_t* index, int64_t places, int64_t experts, int64_t* offsets) {
  std::fill_n(offsets, experts + 1, 0);
  for (int64_t i = 0; i < places; i++) {
    if (index[i] < 0) return 0;
    if (index[i] < experts) offsets[index[i] + 1]++;
  }
  for (int64_t e = 0; e < experts; e++) offsets[e + 1] += offsets[e];
  return 1;
}

// Token, expert and place of those pairs, by expert, then by token.
void crossways_place_pairs(const int64_t* index, int64_t places, int64_t k, int64_t experts, const int64_t* offsets,
                           int64_t* token, int64_t* expert, int64_t* place) {
  std::vector<int64_t> next(offsets, offsets + experts);
  for (int64_t i = 0; i < places; i++) {
    if (index[i] >= experts) continue;
    const int64_t at = next[index[i]]++;
    token[at] = i / k;
    expert[at] = index[i];
    place[at] = i;
  }
}
}
