// What a call is given, how its work is shared out, and the memory it works in.
//
// Legend: T tokens, P pairs sorted by expert, E experts, D model width, F expert width, H rows of the first matrix.
#pragma once
#include <omp.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <memory>
#include <tuple>
#include <vector>

#include "rows.h"

extern "C" struct Problem {
  int64_t tokens, experts, width, expert_width, gated, function, threads;
  const int64_t *token, *offsets;  // (P,), (E + 1,)
  const float* weight;             // (P,)
  const void *x, *up, *down;       // (T, D), (E, H, D), (E, D, F)
  void* kept;                      // what `up` returned, for backward; null when not wanted
  void* y;                         // (T, D)
  const void* grad_y;              // (T, D)
  void *grad_x, *grad_up, *grad_down;  // as x, up, down; null when not wanted
  float* grad_weight;                  // (P,); null when not wanted
};

namespace crossways {

constexpr int64_t GROUP_MIN = 64, GROUP_MAX = 512;
// Of the inputs of a group. Backward, several groups add up gradients as large as the expert, in float32: better few.
constexpr int64_t FORWARD_BYTES = 1 << 20, BACKWARD_BYTES = 1 << 22;
constexpr int64_t SMALL_PAGE = 1 << 12, HUGE_PAGE = 1 << 21;

// Ask for large pages: touching fresh memory then costs a tenth.
inline void large_pages(void* memory, size_t bytes) {
  auto first = (reinterpret_cast<uintptr_t>(memory) + HUGE_PAGE - 1) & ~uintptr_t(HUGE_PAGE - 1);
  auto last = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~uintptr_t(HUGE_PAGE - 1);
  if (memory && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Working memory of one thread, kept between calls.
struct Scratch {
  char* memory = nullptr;
  size_t size = 0, used = 0;
  ~Scratch() { free(memory); }
  void reserve(size_t bytes) {
    used = 0;
    if (bytes <= size) return;
    free(memory);
    size = round_up(bytes, HUGE_PAGE);
    memory = static_cast<char*>(aligned_alloc(HUGE_PAGE, size));
    if (!memory) abort();
    large_pages(memory, size);
  }
  template <class U>
  U* take(size_t count) {
    char* at = memory + used;
    used += round_up(count * sizeof(U), 64);
    return reinterpret_cast<U*>(at);
  }
};
inline thread_local Scratch scratch;

// Sums of the threads of one call, kept between calls unless they are large.
struct Sums {
  static constexpr size_t KEEP = 32 << 20;
  std::vector<std::unique_ptr<Scratch>> memory;
  std::vector<float*> data;
  void resize(size_t count, size_t size) {
    data.clear();
    while (memory.size() < count) memory.push_back(std::make_unique<Scratch>());
    for (size_t i = 0; i < count; i++) {
      memory[i]->reserve(size * 4 + 64);
      data.push_back(memory[i]->take<float>(size));
    }
  }
  void release() {
    for (auto& one : memory)
      if (one->size > KEEP) one = std::make_unique<Scratch>();
  }
};
inline thread_local Sums sums;

// Rows [f0, f1) of the hidden layer of one expert, for all its pairs.
struct Slice {
  int64_t expert, f0, f1;
};

// What every thread does: equal shares of the work, cut between experts or within one at multiples of 32 rows.
inline std::vector<std::vector<Slice>> share(const Problem& p) {
  const int64_t blocks = round_up(p.expert_width, SIDE) / SIDE;
  // Reading an expert's weights costs about as much as multiplying by 64 tokens.
  auto cost = [&](int64_t e) {
    int64_t load = p.offsets[e + 1] - p.offsets[e];
    return load ? round_up(load, SIDE) + 64 : 0;
  };
  double total = 0, done = 0;
  for (int64_t e = 0; e < p.experts; e++) total += double(cost(e)) * blocks;
  std::vector<std::vector<Slice>> shares(p.threads);
  for (int64_t e = 0; e < p.experts; e++) {
    if (!cost(e)) continue;
    for (int64_t b = 0; b < blocks;) {
      int64_t thread = std::min<int64_t>(p.threads - 1, int64_t((done + 0.5 * cost(e)) / total * p.threads));
      double left = total * (thread + 1) / p.threads - done;
      int64_t take = thread == p.threads - 1 ? blocks - b : std::clamp<int64_t>(left / cost(e) + 0.5, 1, blocks - b);
      shares[thread].push_back({e, b * SIDE, std::min(p.expert_width, (b + take) * SIDE)});
      b += take;
      done += double(take) * cost(e);
    }
  }
  return shares;
}

template <class T>
struct Layer {
  const Problem& p;
  const int64_t D = p.width, F = p.expert_width, H = p.gated ? 2 * F : F;
  const int64_t Dp = round_up(D, SIDE);
  const int64_t group_bytes;
  std::vector<int64_t> kept_at;  // first column of each expert in `kept`

  explicit Layer(const Problem& problem, int64_t group_bytes = FORWARD_BYTES)
      : p(problem), group_bytes(group_bytes), kept_at(problem.experts + 1) {
    for (int64_t e = 0; e < p.experts; e++) kept_at[e + 1] = kept_at[e] + round_up(load(e), SIDE);
  }
  int64_t load(int64_t e) const { return p.offsets[e + 1] - p.offsets[e]; }
  int64_t group() const {
    return std::clamp<int64_t>(group_bytes / (Dp * sizeof(T)) / SIDE * SIDE, GROUP_MIN, GROUP_MAX);
  }
  const T* up(int64_t e) const { return static_cast<const T*>(p.up) + e * H * D; }
  const T* down(int64_t e) const { return static_cast<const T*>(p.down) + e * D * F; }
  // Row h of what `up` returned for 32 pairs of expert e, `pair` of all being the first of them: [panel][H][32].
  T* kept(int64_t e, int64_t h, int64_t pair) const {
    return static_cast<T*>(p.kept) + (kept_at[e] + pair - p.offsets[e]) * H + h * SIDE;
  }
};

// Up to GROUP pairs of one expert.
struct Group {
  int64_t first, count;
  int64_t panels() const { return (count + SIDE - 1) / SIDE; }
};

template <class T, class Do>
void for_groups(const Layer<T>& l, int64_t e, Do&& run) {
  int64_t n = l.load(e), groups = (n + l.group() - 1) / l.group();
  int64_t size = round_up((n + groups - 1) / groups, SIDE);
  for (int64_t at = 0; at < n; at += size) {
    int64_t count = std::min(size, n - at);
    run(Group{l.p.offsets[e] + at, count}, at == 0, at + size >= n);
  }
}

// Pointers to the rows of the 32 pairs of a panel; null after the group's last.
template <class T, class From>
void rows_of(const Problem& p, const Group& g, int64_t panel, From* matrix, int64_t width, T** rows) {
  for (int i = 0; i < SIDE; i++) {
    int64_t at = panel * SIDE + i;
    rows[i] = at < g.count ? static_cast<T*>(matrix) + p.token[g.first + at] * width : nullptr;
  }
}

inline void weights_of(const Problem& p, const Group& g, int64_t panel, Vec out[2]) {
  for (int c = 0; c < 2; c++) {
    int64_t at = panel * SIDE + 16 * c;
    out[c] = load(p.weight + g.first + at, first16(g.count - at));
  }
}

// Bring 32 of each of a panel's rows of `sum` into the second-level cache.
inline void fetch_sums(const Problem& p, const Group& g, int64_t panel, const float* sum, int64_t at, int64_t width) {
  const int64_t last = std::min<int64_t>(g.count, (panel + 1) * SIDE);
  for (int64_t i = panel * SIDE; i < last; i++) {
    const float* row = sum + p.token[g.first + i] * width + at;
    asm volatile("prefetcht1 %0" : : "m"(row[0]));
    asm volatile("prefetcht1 %0" : : "m"(row[16]));
  }
}

// Add a block, 32 values of each of a panel's pairs, to `sum`.
inline void add_sums(const Problem& p, const Group& g, int64_t panel, const float* c, float* sum, int64_t at,
                     int64_t width) {
  float* rows[SIDE];
  rows_of(p, g, panel, sum, width, rows);
  add_columns(c, rows, at, width);
}

// Add up the threads' sums, rounding once.
template <class T>
void add_up(const std::vector<float*>& parts, int64_t first, int64_t last, T* out) {
  for (int64_t i = first; i < last; i += 16) {
    const __mmask16 mask = first16(last - i);
    Vec x = load(parts[0] + i, mask);
    for (size_t s = 1; s < parts.size(); s++) x = _mm512_add_ps(x, load(parts[s] + i, mask));
    store(out + i, x, mask);
  }
}

// Run `work` on every thread's slices, each with the slice after it, or null, and the thread's sum; then write the total
// of the sums to `out`.
template <class T, class Work>
void run_shares(const Problem& p, T* out, Work&& work) {
  const auto shares = share(p);
  const int64_t size = p.tokens * p.width, lines = (size + 15) / 16;
  size_t busy = 0;
  for (const auto& slices : shares) busy += !slices.empty();
  sums.resize(out ? std::max<size_t>(busy, 1) : 0, size);
  const std::vector<float*>& parts = sums.data;  // thread_local: name it outside the threads
#pragma omp parallel num_threads(p.threads)
  {
    const int64_t me = omp_get_thread_num(), team = omp_get_num_threads();
    {
      Tiles tiles;
      size_t at = 0;
      for (int64_t t = 0; t < p.threads; t++) {
        const bool mine = t % team == me;
        if (mine && out && (!shares[t].empty() || !busy)) std::memset(parts[busy ? at : 0], 0, size * 4);
        if (mine)
          for (size_t i = 0; i < shares[t].size(); i++)
            work(shares[t][i], i + 1 < shares[t].size() ? &shares[t][i + 1] : nullptr, out ? parts[at] : nullptr);
        at += !shares[t].empty();
      }
    }
    _mm_sfence();  // weight gradients bypass the caches
#pragma omp barrier
    if (out) add_up(parts, lines * me / team * 16, std::min(size, lines * (me + 1) / team * 16), out);
  }
  sums.release();
}

}  // namespace crossways
