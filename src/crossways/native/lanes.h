// Where sixteen experts' columns of a group are cut, an expert a lane: how many of the greatest keys belong.
//
// By halving, as for shared budgets, each lane with bounds of its own. Of many tokens a sample says first what these
// bounds are, and only keys between them are kept.
#pragma once
#include "cuts.h"

// Of the one file that includes this, so that all is inlined as if it stood there.
namespace {

struct Cuts {
  __m512i key, ties;

  bool has_ties() const { return _mm512_test_epi32_mask(ties, ties); }

  // The same, but that every NaN lies above.
  Cuts below_nan() const {
    const __m512i nan = _mm512_set1_epi32(INT32_MAX), one = _mm512_set1_epi32(1);
    const __mmask16 at = _mm512_cmpeq_epi32_mask(key, nan);
    return {_mm512_mask_sub_epi32(key, at, nan, one), _mm512_mask_mov_epi32(ties, at, _mm512_setzero_si512())};
  }
};

// Sixteen experts of one group.
struct Columns {
  const float* x;
  const Allowed& may;
  const Groups& groups;
  int64_t g, piece;

  __m512i keys(int64_t i) const { return keys_at(x, may, groups.token(g, i), piece); }
  void expect(int64_t i) const { __builtin_prefetch(x + groups.token(g, i) * may.experts + 16 * piece); }
};

// Keys among which each lane's cut lies.
struct Lanes {
  std::vector<__m512i> key;  // NOBODY where a lane has fewer than others
  __m512i low, high;         // the cut is not below the one, nor above the other
  __m512i beyond, next;      // how many keys, not among these, lie above `high`, and the least of them

  // Every step-th token.
  void load(const Columns& from, int64_t step) {
    const __m512i nobody = _mm512_set1_epi32(NOBODY);
    key.resize((from.groups.n + step - 1) / step);
    low = next = _mm512_set1_epi32(INT32_MAX), high = nobody, beyond = _mm512_setzero_si512();
    for (size_t i = 0; i < key.size(); i++) {
      from.expect(int64_t(i + 8) * step);
      key[i] = from.keys(int64_t(i) * step);
      low = _mm512_mask_min_epi32(low, _mm512_cmpgt_epi32_mask(key[i], nobody), low, key[i]);
      high = _mm512_max_epi32(high, key[i]);
    }
    low = _mm512_sub_epi32(low, _mm512_set1_epi32(1));
  }

  // Those above `bottom` up to `top` alone. False, and nothing of use, if they are too many to be worth it.
  bool load_between(const Columns& from, __m512i bottom, __m512i top) {
    constexpr int64_t ROWS = 64;  // between two looks at whether there is room
    const __m512i one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(INT32_MAX), nobody = _mm512_set1_epi32(NOBODY);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i count = _mm512_setzero_si512();
    low = bottom, high = top, beyond = count, next = most;
    key.assign(4 * ROWS, nobody);
    for (int64_t first = 0; first < from.groups.n; first += ROWS) {
      const size_t needed = size_t(_mm512_reduce_max_epi32(count) + ROWS);
      if (int64_t(needed) > from.groups.n / 4) return false;
      if (needed > key.size()) key.resize(2 * needed, nobody);
      for (int64_t i = first; i < std::min(from.groups.n, first + ROWS); i++) {
        from.expect(i + 16);
        const __m512i here = from.keys(i);
        const __mmask16 above = _mm512_cmpgt_epi32_mask(here, top);
        beyond = _mm512_mask_add_epi32(beyond, above, beyond, one);
        next = _mm512_mask_min_epi32(next, above, next, here);
        const __mmask16 between = _mm512_mask_cmpgt_epi32_mask(__mmask16(~above), here, bottom);
        if (!between) continue;
        const __m512i at = _mm512_add_epi32(_mm512_slli_epi32(count, 4), lane);
        _mm512_mask_i32scatter_epi32(key.data(), between, at, here, 4);
        count = _mm512_mask_add_epi32(count, between, count, one);
      }
    }
    key.resize(_mm512_reduce_max_epi32(count));
    return true;
  }

  __m512i above(__m512i line) const {
    const __m512i one = _mm512_set1_epi32(1);
    __m512i even = beyond, odd = _mm512_setzero_si512();
    size_t i = 0;
    for (; i + 2 <= key.size(); i += 2) {
      even = _mm512_mask_add_epi32(even, _mm512_cmpgt_epi32_mask(key[i], line), even, one);
      odd = _mm512_mask_add_epi32(odd, _mm512_cmpgt_epi32_mask(key[i + 1], line), odd, one);
    }
    if (i < key.size()) even = _mm512_mask_add_epi32(even, _mm512_cmpgt_epi32_mask(key[i], line), even, one);
    return _mm512_add_epi32(even, odd);
  }

  __m512i least_above(__m512i line) const {
    __m512i least = next;
    for (const __m512i& here : key)
      least = _mm512_mask_min_epi32(least, _mm512_cmpgt_epi32_mask(here, line), least, here);
    return least;
  }

  // Lanes whose cut at this budget need not be sought: all that take part belong.
  __mmask16 whole(__m512i budget) const {
    return _mm512_cmpge_epi32_mask(budget, above(_mm512_set1_epi32(NOBODY)));
  }

  // Whether the cuts do lie between `low` and `high`.
  bool holds(__m512i budget) const {
    const __mmask16 some = _mm512_cmpgt_epi32_mask(budget, _mm512_setzero_si512());
    const __mmask16 below = _mm512_cmpgt_epi32_mask(low, _mm512_set1_epi32(NOBODY)) & whole(budget);
    return !(some & (below | _mm512_cmpgt_epi32_mask(beyond, budget)));
  }
};

// Halfway between two keys, rounded down.
__m512i between(__m512i low, __m512i high) {
  return _mm512_add_epi32(_mm512_and_si512(low, high), _mm512_srai_epi32(_mm512_xor_si512(low, high), 1));
}

Cuts cuts_of(const Lanes& lanes, __m512i budget) {
  const __m512i none = _mm512_setzero_si512(), one = _mm512_set1_epi32(1);
  __m512i low = lanes.low, high = lanes.high, above_high = lanes.beyond;
  const __mmask16 some = _mm512_cmpgt_epi32_mask(budget, none);
  __mmask16 open = some & ~lanes.whole(budget);
  Cuts cuts{_mm512_mask_mov_epi32(_mm512_set1_epi32(INT32_MAX), some, _mm512_set1_epi32(NOBODY)), none};
  while (open) {
    const __mmask16 last = open & ~_mm512_cmplt_epi32_mask(_mm512_add_epi32(low, one), high);
    cuts.key = _mm512_mask_mov_epi32(cuts.key, last, high);
    cuts.ties = _mm512_mask_sub_epi32(cuts.ties, last, budget, above_high);
    if (!(open &= ~last)) break;
    const __m512i middle = between(low, high), above = lanes.above(middle);
    const __mmask16 found = open & _mm512_cmpeq_epi32_mask(above, budget);
    cuts.key = _mm512_mask_mov_epi32(cuts.key, found, middle);
    open &= ~found;
    const __mmask16 more = open & _mm512_cmpgt_epi32_mask(above, budget), less = open & ~more;
    low = _mm512_mask_mov_epi32(low, more, middle);
    high = _mm512_mask_mov_epi32(high, less, middle);
    above_high = _mm512_mask_mov_epi32(above_high, less, above);
  }
  return cuts;
}

// Loads what the cuts at this budget lie among. Of many tokens a sample says between which keys that is, but for
// one time in thousands, so that they are read once and few of them are kept: all would not stay in the cache.
void load(Lanes& lanes, const Columns& from, __m512i budget) {
  constexpr int64_t MANY = 4096;
  if (const int64_t n = from.groups.n; n >= MANY) {
    const int64_t step = n / std::min(n / 8, MANY);
    lanes.load(from, step);
    const __m512 share = _mm512_div_ps(_mm512_cvtepi32_ps(budget), _mm512_set1_ps(float(step)));
    // Four standard deviations of how many of a sample belong.
    const __m512 doubt = _mm512_fmadd_ps(_mm512_sqrt_ps(share), _mm512_set1_ps(4), _mm512_set1_ps(2));
    const Cuts least = cuts_of(lanes, _mm512_cvtps_epi32(_mm512_add_ps(share, doubt)));
    const Cuts most = cuts_of(lanes, _mm512_cvtps_epi32(_mm512_sub_ps(share, doubt)));
    const __mmask16 ties = _mm512_test_epi32_mask(least.ties, least.ties);
    const __m512i below = _mm512_mask_sub_epi32(least.key, ties, least.key, _mm512_set1_epi32(1));
    if (lanes.load_between(from, below, most.key) && lanes.holds(budget)) return;
  }
  lanes.load(from, 1);
}

}  // namespace
