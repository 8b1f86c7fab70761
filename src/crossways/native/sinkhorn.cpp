// Sinkhorn's iteration: scales of rows and columns at which every token supplies and every expert demands the same; and
// each token's greatest entries at these scales.
//
// The exponentials are in `exponentials.h`, the iteration in `column_scales.h`.
//
// Legend: T tokens, E experts, G groups of N tokens.
#include <memory>

#include "column_scales.h"
#include "sixteen.h"

namespace {

// One group, by so many threads.
struct Group {
  Rows rows;
  int64_t threads;

  // The columns' scales, rounded, from exponentials that are then where the scaled entries may go.
  std::vector<float> balance(int64_t most, double tolerance) const {
    const int64_t n = rows.n, experts = rows.experts;
    const int64_t counted = rows.valid ? n - std::count(rows.valid, rows.valid + n, 0) : n;
    const double many = double(std::max<int64_t>(counted, 1));
    const std::vector<double> scale =
        experts % 8 ? column_scales(Problem<false>{rows, rows.mass, n, experts, many}, most, tolerance, threads)
                    : column_scales(Problem<true>{rows, rows.mass, n, experts, many}, most, tolerance, threads);
    return {scale.begin(), scale.end()};
  }

  // Of one of its tokens; see `scaled`.
  const float* logits(int64_t t) const { return rows.odd ? rows.x + t * rows.experts : nullptr; }

  void scale(const std::vector<float>& by) const {
    const int64_t experts = rows.experts;
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < rows.n; t++) {
      float* mass = rows.mass + t * experts;
      for (int64_t e = 0; e < experts; e += 16) {
        const __mmask16 real = lanes(experts - e);
        _mm512_mask_storeu_ps(mass + e, real, scaled(logits(t), mass, by.data(), e, real));
      }
    }
  }

  // Bits of each token's k greatest; its first token is token `begin` of all.
  void choose(const std::vector<float>& by, const Allowed& may, const Bits& bits, int64_t begin, int64_t k) const {
    // No scaled entry is negative, so that its bits are its key.
    auto key_of = [x = logits(0), mass = rows.mass, experts = rows.experts, to = by.data()](
                      int64_t t, int64_t piece, __mmask16 real) {
      const float* own = x ? x + t * experts : nullptr;
      return _mm512_castps_si512(scaled(own, mass + t * experts, to, 16 * piece, real));
    };
#pragma omp parallel num_threads(threads)
    {
      Sixteen found(rows.experts, k);
#pragma omp for schedule(static)
      for (int64_t first = 0; first < rows.n; first += 16) {
        const int64_t count = std::min<int64_t>(16, rows.n - first);
        if (k == 1) {
          for (int64_t t = first; t < first + count; t++)
            found.put_greatest(bits, may, begin + t,
                               [&](int64_t piece, __mmask16 real) { return key_of(t, piece, real); });
          continue;
        }
        found.load(may, begin + first, count,
                   [&](int64_t i, int64_t piece, __mmask16 real) { return key_of(first + i, piece, real); });
        found.rank(k);
        put_open(bits, found, begin + first, count, k);
      }
    }
  }
};

// `each(g, threads)` for every group, one after the other by all threads, or side by side.
template <class Each>
void for_groups(int64_t groups, int64_t threads, Each each) {
  if (groups < threads) {
    for (int64_t g = 0; g < groups; g++) each(g, threads);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t g = 0; g < groups; g++) each(g, 1);
}

}  // namespace

extern "C" {

// balanced = a group's exponentials times its column scales, infinite where a logit is no number or positive infinity.
// valid (G, N) says which tokens take part; null for all.
void crossways_sinkhorn(const float* logits, const uint8_t* valid, int64_t groups, int64_t n, int64_t experts,
                        int64_t most, double tolerance, float* balanced, int64_t threads) {
  for_groups(groups, threads, [=](int64_t g, int64_t by) {
    const int64_t at = g * n * experts;
    const Group group{{logits + at, valid ? valid + g * n : nullptr, n, experts, balanced + at}, by};
    group.scale(group.balance(most, tolerance));
  });
}

// Bits of each token's k greatest allowed entries of that, which is not written down.
void crossways_bits_of_sinkhorn(const float* logits, const uint8_t* valid, const uint64_t* allowed, int64_t groups,
                                int64_t n, int64_t experts, int64_t most, double tolerance, int64_t k, uint64_t* words,
                                int64_t threads) {
  const Allowed may(allowed, experts);
  const Bits bits(words, experts);
  // What a thread needs for one group, used for the next as well: it is still in its cache.
  const int64_t size = n * experts, rooms = groups < threads ? 1 : threads;
  const std::unique_ptr<float[]> room(new float[rooms * size]);
  for_groups(groups, threads, [&](int64_t g, int64_t by) {
    float* mass = room.get() + (rooms == 1 ? 0 : omp_get_thread_num()) * size;
    const Group group{{logits + g * size, valid ? valid + g * n : nullptr, n, experts, mass}, by};
    group.choose(group.balance(most, tolerance), may, bits, g * n, k);
  });
}
}
