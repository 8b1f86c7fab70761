// The forward pass for few tokens on the matrix unit: where an expert has several, in bfloat16, multiplying vectors
// takes longer than reading the weights.
//
// Legend: T tokens, P pairs sorted by expert, G groups of up to sixteen pairs of an expert, D model width, F expert
// width.
#pragma once
#include "few.h"
#include "few_tiles.h"

namespace crossways {

struct TiledFew : FewLayer<bf16> {
  // Of one thread: words of tokens, products of the first matrix's two halves or of the second, rows at an edge.
  struct Work {
    uint32_t* words;
    float *gate, *value;
    bf16* packed;
  };
  const int64_t groups = MANY / TILE, outputs = round_up(std::max(D, F), TILE) * TILE * groups;
  const int64_t depth = words_of_group(F);
  std::vector<int64_t> group_of;  // first group of each expert
  uint32_t* hidden;               // (G, words_of_group(F))
  std::vector<Work> work;         // of each thread

  explicit TiledFew(const Problem& problem) : FewLayer(problem), group_of(problem.experts + 1), work(problem.threads) {
    for (int64_t e = 0; e < p.experts; e++) group_of[e + 1] = group_of[e] + (l.load(e) + TILE - 1) / TILE;
    const int64_t size = p.tokens * D, words = words_of_group(D) * groups, edge = TILE * round_up(std::max(D, F), 32);
    const int64_t each = words * 4 + 2 * outputs * 4 + edge * 2 + 256;
    scratch.reserve(group_of[p.experts] * depth * 4 + size * 4 + p.threads * each + 128);
    hidden = scratch.take<uint32_t>(group_of[p.experts] * depth);
    sum = scratch.take<float>(size);
    for (Work& one : work) {
      one.words = scratch.take<uint32_t>(words);
      one.gate = scratch.take<float>(outputs);
      one.value = scratch.take<float>(outputs);
      one.packed = scratch.take<bf16>(edge);
    }
  }

  // Time that a hidden value takes: that of reading its weights, and a little of multiplying.
  int64_t cost(int64_t e) const { return 16 + (l.load(e) + TILE - 1) / TILE; }
  uint32_t* hidden_of(int64_t e, int64_t pair) const {
    return hidden + (group_of[e] + (pair - p.offsets[e]) / TILE) * depth;
  }

  // Hidden values [f0, f1) of an expert.
  template <Function function>
  void hide(const Work& mine, int64_t e, int64_t f0, int64_t f1) const {
    const bf16* up = l.up(e) + f0 * D;
    const int64_t rows = f1 - f0, end = f1 < F ? rows : round_up(F, 2 * TILE) - f0, group = round_up(rows, TILE) * TILE;
    for_pairs(e, [&](int64_t pair, int64_t n) {
      const bf16* x[MANY];
      for (int64_t i = 0; i < n; i++) x[i] = static_cast<const bf16*>(p.x) + p.token[pair + i] * D;
      pack_words(x, n, D, mine.words);
      multiply_tiles(up, rows, D, mine.words, n, mine.gate, mine.packed);
      if (p.gated) multiply_tiles(up + F * D, rows, D, mine.words, n, mine.value, mine.packed);
      for (int64_t at = 0; at < n; at += TILE) {
        const float *gate = mine.gate + at / TILE * group, *value = mine.value + at / TILE * group;
        const __mmask16 mask = first16(n - at);
        keep(e, pair + at, mask, f0, rows, gate);
        if (p.gated) keep(e, pair + at, mask, F + f0, rows, value);
        uint32_t* words = hidden_of(e, pair + at) + f0 / 2 * TILE;
        activate<function>(gate, value, load(p.weight + pair + at, mask), rows, end, words);
      }
    });
  }
  // Rows from h on of what `up` returned for a group, for backward.
  void keep(int64_t e, int64_t pair, __mmask16 mask, int64_t h, int64_t rows, const float* from) const {
    if (!p.kept) return;
    const int64_t in_panel = (pair - p.offsets[e]) % SIDE;
    bf16* to = l.kept(e, h, pair - in_panel) + in_panel;
    for (int64_t r = 0; r < rows; r++) store(to + r * SIDE, load(from + r * TILE), mask);
  }
  // `rows` hidden values of a group, from an even one on, as words; zeros from there up to `end`.
  template <Function function>
  void activate(const float* gate, const float* value, Vec weight, int64_t rows, int64_t end, uint32_t* words) const {
    auto one = [&](int64_t r) {
      if (r >= rows) return Vec{};
      const Vec out = _mm512_mul_ps(apply<function>(load(gate + r * TILE)), weight);
      return p.gated ? _mm512_mul_ps(out, load(value + r * TILE)) : out;
    };
    for (int64_t r = 0; r < end; r += 2) _mm512_storeu_si512(words + r / 2 * TILE, pair_words(one(r), one(r + 1)));
  }

  // Add outputs [d0, d1) of an expert's pairs to `sum`.
  void add(const Work& mine, int64_t e, int64_t pair, int64_t n, int64_t d0, int64_t d1) const {
    const int64_t rows = d1 - d0, group = round_up(rows, TILE) * TILE;
    multiply_tiles(l.down(e) + d0 * F, rows, F, hidden_of(e, pair), n, mine.gate, mine.packed);
    Words square[TILE];
    for (int64_t at = 0; at < n; at += TILE)
      for (int64_t d = 0; d < rows; d += TILE) {
        const float* from = mine.gate + at / TILE * group + d * TILE;
        for (int64_t i = 0; i < TILE; i++) square[i] = _mm512_loadu_si512(from + i * TILE);
        transpose(square);
        const __mmask16 mask = first16(rows - d);
        for (int64_t i = 0; i < std::min(TILE, n - at); i++) {
          float* to = sum + p.token[pair + at + i] * D + d0 + d;
          store(to, _mm512_add_ps(load(to, mask), _mm512_castsi512_ps(square[i])), mask);
        }
      }
  }

  template <Function function>
  void run() const {
#pragma omp parallel num_threads(p.threads)
    {
      Tiles tiles;
      const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
      const Work& mine = work[me];
      for_share(me, team, [&](int64_t e) { return cost(e); },
                [&](int64_t e, int64_t f0, int64_t f1) { hide<function>(mine, e, f0, f1); });
#pragma omp barrier
      const int64_t d0 = share_of_few(D, me, team), d1 = share_of_few(D, me + 1, team);
      put(d0, d1, [&](int64_t e, int64_t pair, int64_t n) { add(mine, e, pair, n, d0, d1); });
    }
  }
};

}  // namespace crossways
