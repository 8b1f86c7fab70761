// The greatest entries of each expert in each group of tokens: expert choice, capacity by score, and their cutoffs.
//
// `lanes.h` finds the cuts, sixteen experts at a time; here they are made bits.
//
// Legend: T tokens, E experts, G groups of N tokens.
#include "lanes.h"

namespace {

// NaN, whose key is the greatest, where the cut takes nothing.
void write_least(const Lanes& lanes, const Cuts& cuts, __mmask16 real, float* least) {
  const __mmask16 ties = _mm512_cmpgt_epi32_mask(cuts.ties, _mm512_setzero_si512());
  _mm512_mask_storeu_ps(least, real, floats_of(_mm512_mask_mov_epi32(lanes.least_above(cuts.key), ties, cuts.key)));
}

// Bits of a group where not all equals of a cut belong: the first of each column do.
void mark_ties(const float* x, const Allowed& may, const Groups& groups, int64_t g, const Cuts* cuts, const Bits& bits) {
  std::vector<Cuts> left(cuts, cuts + bits.pieces());
  for (int64_t i = 0; i < groups.n; i++)
    for (int64_t piece = 0; piece < bits.pieces(); piece++) {
      const __m512i keys = keys_at(x, may, groups.token(g, i), piece);
      __m512i& room = left[piece].ties;
      const __mmask16 equal = _mm512_cmpeq_epi32_mask(keys, cuts[piece].key);
      const __mmask16 tie = _mm512_mask_cmpgt_epi32_mask(equal, room, _mm512_setzero_si512());
      room = _mm512_mask_sub_epi32(room, tie, room, _mm512_set1_epi32(1));
      bits.put(groups.token(g, i), piece, _mm512_cmpgt_epi32_mask(keys, cuts[piece].key) | tie);
    }
}

// By the team that calls it. A group where some cut has ties, which is rare, is one thread's work: the first ones count.
void mark(const float* x, const Allowed& may, const Groups& groups, const Cuts* cuts, const Bits& bits) {
  for (int64_t g = 0; g < groups.count; g++) {
    const Cuts* own = cuts + g * bits.pieces();
    bool ties = false;
    for (int64_t piece = 0; piece < bits.pieces(); piece++) ties |= own[piece].has_ties();
    if (ties) {
#pragma omp single nowait
      mark_ties(x, may, groups, g, own, bits);
      continue;
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < groups.n; i++)
      for (int64_t piece = 0; piece < bits.pieces(); piece++) {
        const __m512i keys = keys_at(x, may, groups.token(g, i), piece);
        bits.put(groups.token(g, i), piece, _mm512_cmpgt_epi32_mask(keys, own[piece].key));
      }
  }
}

}  // namespace

extern "C" {

// Bits of the budgets.of(g, e) greatest allowed entries of each group's columns (all allowed ones if there are fewer),
// earlier ones of equals first, with `broken` every NaN beside; least (G, E), the least of them, NaN where there is
// none. `words` and `least` may be null.
void crossways_column_cuts(const float* x, const uint64_t* allowed, const int64_t* budget, int64_t group_step,
                           int64_t column_step, int64_t count, int64_t n, int64_t experts, int64_t broken,
                           uint64_t* words, float* least, int64_t threads) {
  const Groups groups{count, n, n, 1};
  const Allowed may(allowed, experts);
  const Budgets budgets{budget, group_step, column_step};
  const Bits bits(words, experts);
  const int64_t pieces = (experts + 15) / 16;
  std::vector<Cuts> cuts(count * bits.pieces(), Cuts{_mm512_setzero_si512(), _mm512_setzero_si512()});
#pragma omp parallel num_threads(threads)
  {
    Lanes lanes;
#pragma omp for schedule(static)
    for (int64_t at = 0; at < count * pieces; at++) {
      const int64_t g = at / pieces, piece = at % pieces;
      alignas(64) int32_t budget_of[16] = {};
      for (int64_t e = 16 * piece; e < std::min(experts, 16 * piece + 16); e++)
        budget_of[e % 16] = int32_t(std::clamp<int64_t>(budgets.of(g, e), 0, n + 1));
      const __m512i budget_here = _mm512_load_si512(budget_of);
      load(lanes, Columns{x, may, groups, g, piece}, budget_here);
      Cuts& found = cuts[g * bits.pieces() + piece] = cuts_of(lanes, budget_here);
      if (least) write_least(lanes, found, may.real(piece), least + g * experts + 16 * piece);
      if (broken) found = found.below_nan();
    }
    if (words) mark(x, may, groups, cuts.data(), bits);
  }
}
}
