// Which pairs are chosen, or may be, one bit each: an eighth of what a mask of bytes would have to carry.
#pragma once
#include <cstdint>

#include "rank.h"

// Legend: T tokens, E experts. Bit e % 64 of word e / 64 of a token is expert e; those from E on are zero.
template <class Word>
struct BitsOf {
  Word* words;  // (T, width)
  int64_t experts, width;

  BitsOf(Word* words_, int64_t experts_) : words(words_), experts(experts_), width((experts_ + 63) / 64) {}

  Word* of(int64_t token) const { return words + token * width; }

  int64_t pieces() const { return 4 * width; }

  // Lanes of the piece-th sixteen experts that exist.
  __mmask16 real(int64_t piece) const { return lanes(experts - 16 * piece); }
};

// Where pairs are chosen.
struct Bits : BitsOf<uint64_t> {
  using BitsOf::BitsOf;

  void put(int64_t token, int64_t piece, __mmask16 taken) const {
    reinterpret_cast<uint16_t*>(of(token))[piece] = taken;
  }

  void add(int64_t token, int64_t expert) const { of(token)[expert / 64] |= uint64_t(1) << expert % 64; }
};

// Which pairs may be chosen: all that exist where there are no words.
struct Allowed : BitsOf<const uint64_t> {
  using BitsOf::BitsOf;

  __mmask16 open(int64_t token, int64_t piece) const {
    return words ? reinterpret_cast<const uint16_t*>(of(token))[piece] : real(piece);
  }

  bool has(int64_t token, int64_t expert) const { return !words || of(token)[expert / 64] >> expert % 64 & 1; }
};
