// The greatest pairs of each group of tokens, all its pairs competing for one budget: top-c, and the cutoff of its twin.
//
// By halving: count what lies above a key halfway between two others, until the count is the budget. What cannot
// matter any more is dropped on the way, so that all of it takes a few passes. Of many tokens a sample says first between
// which keys the cut lies, and only these are kept: all would not stay in the cache.
//
// Legend: T tokens, E experts, G groups of N tokens.
#include <cmath>

#include "cuts.h"

namespace {

// Of some tokens, those keys that lie above `bottom` and up to `top`.
struct Between {
  std::vector<int32_t> key;
  int64_t kept = 0, above = 0;  // how many these are, and how many lie above `top`

  void load(const float* x, const Allowed& may, const Groups& groups, int64_t g, int64_t begin, int64_t end,
            int32_t bottom, int32_t top) {
    const int64_t pieces = (may.experts + 15) / 16;
    const __m512i least = _mm512_set1_epi32(bottom), most = _mm512_set1_epi32(top);
    for (int64_t i = begin; i < end; i++) {
      if (kept + 16 * pieces > int64_t(key.size())) key.resize(2 * key.size() + 64 * pieces);
      for (int64_t piece = 0; piece < pieces; piece++) {
        __builtin_prefetch(x + groups.token(g, i + 16) * may.experts + 16 * piece);
        const __m512i here = keys_at(x, may, groups.token(g, i), piece);
        const __mmask16 higher = _mm512_cmpgt_epi32_mask(here, most);
        const __mmask16 stays = _mm512_mask_cmpgt_epi32_mask(__mmask16(~higher), here, least);
        above += __builtin_popcount(higher);
        _mm512_storeu_si512(&key[kept], _mm512_maskz_compress_epi32(stays, here));  // no branch: none is foreseen
        kept += __builtin_popcount(stays);
      }
    }
  }
};

// A group's keys in whole vectors, shared by some threads.
struct Keys {
  std::vector<int32_t> key;
  int64_t threads;
  int32_t low, high;    // the least and the greatest of those that take part, or bounds of where the cut lies
  int64_t dropped = 0;  // how many keys, not among these, lie above `high`

  explicit Keys(int64_t threads_) : threads(threads_) {}

  void load(const float* x, const Allowed& may, const Groups& groups, int64_t g) {
    const int64_t pieces = (may.experts + 15) / 16;
    key.resize(16 * pieces * groups.n);
    low = INT32_MAX, high = NOBODY, dropped = 0;
    if (threads == 1) return load_part(x, may, groups, g, 0, groups.n, low, high);
    int32_t least = low, most = high;
#pragma omp parallel for num_threads(threads) reduction(min : least) reduction(max : most)
    for (int64_t part = 0; part < threads; part++)
      load_part(x, may, groups, g, groups.n * part / threads, groups.n * (part + 1) / threads, least, most);
    low = least, high = most;
  }

  // Those above `bottom` up to `top` alone. False, and nothing of use, if the cut at this budget is not among them.
  bool load_between(const float* x, const Allowed& may, const Groups& groups, int64_t g, int32_t bottom, int32_t top,
                    int64_t budget) {
    std::vector<Between> parts(threads);
    auto load_one = [&](int64_t part) {
      parts[part].load(x, may, groups, g, groups.n * part / threads, groups.n * (part + 1) / threads, bottom, top);
    };
    if (threads == 1) {
      load_one(0);
    } else {
#pragma omp parallel for num_threads(threads)
      for (int64_t part = 0; part < threads; part++) load_one(part);
    }
    int64_t kept = 0;
    dropped = 0;
    for (const Between& part : parts) kept += part.kept, dropped += part.above;
    if (dropped >= budget || dropped + kept <= budget) return false;
    key.clear();
    for (const Between& part : parts) key.insert(key.end(), part.key.begin(), part.key.begin() + part.kept);
    key.resize((kept + 15) / 16 * 16, NOBODY);
    low = bottom + 1, high = top;
    return true;
  }

  int64_t above(int32_t line) const {
    if (threads == 1) return above_part(line, 0, key.size());
    const int64_t vectors = key.size() / 16;
    int64_t sum = 0;
#pragma omp parallel for num_threads(threads) reduction(+ : sum)
    for (int64_t part = 0; part < threads; part++)
      sum += above_part(line, vectors * part / threads * 16, vectors * (part + 1) / threads * 16);
    return sum;
  }

  // Keeps those above `bottom` up to `top` alone. In place: what is written never reaches beyond what was read.
  void narrow(int32_t bottom, int32_t top) {
    const __m512i least = _mm512_set1_epi32(bottom), most = _mm512_set1_epi32(top);
    size_t kept = 0;
    for (size_t i = 0; i < key.size(); i += 16) {
      const __m512i here = _mm512_loadu_si512(&key[i]);
      const __mmask16 stays = _mm512_mask_cmple_epi32_mask(_mm512_cmpgt_epi32_mask(here, least), here, most);
      _mm512_storeu_si512(&key[kept], _mm512_maskz_compress_epi32(stays, here));
      kept += __builtin_popcount(stays);
    }
    key.resize((kept + 15) / 16 * 16, NOBODY);
    std::fill(key.begin() + kept, key.end(), NOBODY);
  }

  // The least key above a cut; the greatest there can be if there is none.
  int32_t least_above(int32_t cut) const {
    __m512i least = _mm512_set1_epi32(INT32_MAX);
    for (size_t i = 0; i < key.size(); i += 16) {
      const __m512i here = _mm512_loadu_si512(&key[i]);
      least = _mm512_mask_min_epi32(least, _mm512_cmpgt_epi32_mask(here, _mm512_set1_epi32(cut)), least, here);
    }
    return _mm512_reduce_min_epi32(least);
  }

 private:
  void load_part(const float* x, const Allowed& may, const Groups& groups, int64_t g, int64_t begin, int64_t end,
                 int32_t& low_, int32_t& high_) {
    const int64_t pieces = (may.experts + 15) / 16;
    __m512i least = _mm512_set1_epi32(INT32_MAX), most = _mm512_set1_epi32(NOBODY);
    for (int64_t i = begin; i < end; i++)
      for (int64_t piece = 0; piece < pieces; piece++) {
        const __m512i here = keys_at(x, may, groups.token(g, i), piece);
        _mm512_storeu_si512(&key[16 * (i * pieces + piece)], here);
        least = _mm512_mask_min_epi32(least, _mm512_cmpgt_epi32_mask(here, _mm512_set1_epi32(NOBODY)), least, here);
        most = _mm512_max_epi32(most, here);
      }
    low_ = std::min(low_, _mm512_reduce_min_epi32(least));
    high_ = std::max(high_, _mm512_reduce_max_epi32(most));
  }

  int64_t above_part(int32_t line, int64_t begin, int64_t end) const {
    const __m512i cut = _mm512_set1_epi32(line);
    int64_t sum = 0;
    for (int64_t i = begin; i < end; i += 16)
      sum += __builtin_popcount(_mm512_cmpgt_epi32_mask(_mm512_loadu_si512(&key[i]), cut));
    return sum;
  }
};

Cut cut_of(Keys& keys, int64_t budget) {
  if (budget <= 0) return NOTHING;
  int64_t dropped = keys.dropped, above_low = dropped + keys.above(NOBODY), above_high = dropped;
  if (budget >= above_low) return EVERYTHING;
  int32_t low = keys.low - 1, high = keys.high;  // more than the budget lies above `low`, less above `high`
  while (low + 1 < high) {
    const int32_t middle = between(low, high);
    const int64_t above = dropped + keys.above(middle);
    if (above == budget) return {middle, 0};
    (above > budget ? low : high) = middle;
    (above > budget ? above_low : above_high) = above;
    if (keys.key.size() > 256 && 4 * (above_low - above_high) < int64_t(keys.key.size())) {
      keys.narrow(low, high);
      dropped = above_high;
    }
  }
  return {high, budget - above_high};
}

// Loads what the cut at this budget lies among. Of many tokens a sample says between which keys that is, but for one
// time in thousands.
void load(Keys& keys, const float* x, const Allowed& may, const Groups& groups, int64_t g, int64_t budget) {
  constexpr int64_t MANY = 1024;
  if (groups.n >= MANY && budget > 0) {
    const int64_t step = groups.n / std::clamp<int64_t>(groups.n / 16, MANY / 4, 2 * MANY);
    const Groups some{groups.count, (groups.n + step - 1) / step, groups.across, groups.along * step};
    Keys sample(1);
    sample.load(x, may, some, g);
    Keys again = sample;  // as cutting drops keys
    const double share = double(budget) * double(some.n) / double(groups.n);
    const double doubt = 6 * std::sqrt(share) + 2;  // standard deviations; a token's scores depend on each other
    const Cut least = cut_of(sample, std::llround(share + doubt)), most = cut_of(again, std::llround(share - doubt));
    const int32_t bottom = least.ties ? least.key - 1 : least.key;
    if (keys.load_between(x, may, groups, g, bottom, most.key, budget)) return;
  }
  keys.load(x, may, groups, g);
}

// NaN, whose key is the greatest, if the cut takes nothing.
float least_of(const Keys& keys, const Cut& cut) {
  return float_of(cut.ties ? cut.key : keys.least_above(cut.key));
}

// Bits of a group of what lies above the cut.
void mark_above(const float* x, const Allowed& may, const Groups& groups, int64_t g, Cut cut, const Bits& bits,
                int64_t threads) {
  const __m512i line = _mm512_set1_epi32(cut.key);
  auto mark = [&](int64_t token) {
    for (int64_t piece = 0; piece < bits.pieces(); piece++)
      bits.put(token, piece, _mm512_cmpgt_epi32_mask(keys_at(x, may, token, piece), line));
  };
  if (threads == 1) {
    for (int64_t i = 0; i < groups.n; i++) mark(groups.token(g, i));
    return;
  }
#pragma omp parallel for num_threads(threads)
  for (int64_t i = 0; i < groups.n; i++) mark(groups.token(g, i));
}

// Bits of a group where not all equals of the cut belong: the first of them do.
void mark_ties(const float* x, const Allowed& may, const Groups& groups, int64_t g, Cut cut, const Bits& bits) {
  const __m512i line = _mm512_set1_epi32(cut.key);
  for (int64_t i = 0; i < groups.n; i++)
    for (int64_t piece = 0; piece < bits.pieces(); piece++) {
      const __m512i keys = keys_at(x, may, groups.token(g, i), piece);
      __mmask16 taken = _mm512_cmpgt_epi32_mask(keys, line);
      for (__mmask16 ties = _mm512_cmpeq_epi32_mask(keys, line); ties && cut.ties > 0; ties &= ties - 1, cut.ties--)
        taken |= ties & -ties;
      bits.put(groups.token(g, i), piece, taken);
    }
}

}  // namespace

extern "C" {

// Bits of the budget.of(g) greatest allowed pairs of each group (all allowed ones if there are fewer), earlier ones of
// equals first; least[g] = the least of them, NaN where there is none. `words` and `least` may be null.
void crossways_shared_cuts(const float* x, const uint64_t* allowed, const int64_t* budget, int64_t budget_step,
                           int64_t count, int64_t n, int64_t across, int64_t along, int64_t experts, uint64_t* words,
                           float* least, int64_t threads) {
  const Groups groups{count, n, across, along};
  const Allowed may(allowed, experts);
  const Bits bits(words, experts);
  auto decide = [&](Keys& keys, int64_t g) {
    load(keys, x, may, groups, g, budget[g * budget_step]);
    const Cut cut = cut_of(keys, budget[g * budget_step]);
    if (least) least[g] = least_of(keys, cut);
    if (!words) return;
    if (cut.ties) return mark_ties(x, may, groups, g, cut, bits);
    mark_above(x, may, groups, g, cut, bits, keys.threads);
  };
  if (count < threads) {  // every group is all threads' work
    Keys keys(threads);
    for (int64_t g = 0; g < count; g++) decide(keys, g);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Keys keys(1);
#pragma omp for schedule(static)
    for (int64_t g = 0; g < count; g++) decide(keys, g);
  }
}
}
