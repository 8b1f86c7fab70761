// Groups of tokens that compete for a budget, and marking what lies above their cuts.
//
// Legend: T tokens, E experts, G groups of N tokens.
#pragma once
#include <omp.h>

#include <vector>

#include "bits.h"

// Tokens of group g: g * across, and from there on every along-th.
struct Groups {
  int64_t count, n, across, along;

  int64_t token(int64_t g, int64_t i) const { return g * across + i * along; }
};

// Budgets of groups, or of their columns: with steps of 0 all have the same.
struct Budgets {
  const int64_t* first;
  int64_t group_step, column_step;

  int64_t of(int64_t g, int64_t column) const { return first[g * group_step + column * column_step]; }
};

inline __m512i keys_at(const float* x, const Allowed& may, int64_t token, int64_t piece) {
  return keys_of(x + token * may.experts + 16 * piece, may.real(piece), may.open(token, piece));
}
