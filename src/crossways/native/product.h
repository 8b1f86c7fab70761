// Products of 32 rows by panels of 32 columns, accumulated in float32.
//
// The left operand is read where it lies, the right one is a panel of words: [k][32]. bfloat16 runs on the matrix
// unit (AMX), 32 summed values a step; float32 on vectors of 16, in steps of 32 likewise, so that both have the same
// shape from outside.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "simd.h"

namespace crossways {

constexpr int SIDE = 32;             // rows and columns of one block, and summed values of one step
constexpr int BLOCK = SIDE * SIDE;   // floats of one block

inline int64_t round_up(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

template <class T>
struct Kind;
template <>
struct Kind<float> {
  static constexpr int per_word = 1;
  static constexpr int chunk = 8;  // steps after which the right operand would leave the first-level cache
};
template <>
struct Kind<bf16> {
  static constexpr int per_word = 2;
  static constexpr int chunk = 16;
};

// Where the two halves of 32 left rows lie: element (r, s) of half h is half[h][r * row + s / 32 * step + s % 32].
template <class T>
struct Left {
  const T* half[2];
  int64_t row, step;
};

// Which rows of the left operand that comes next to bring into the cache.
template <class T>
struct Ahead {
  const Left<T>* left;
  int64_t first, last;
  Ahead part(int64_t at, int64_t count) const {  // the share of `count` of 32 rows of the operand at work
    return {left, first + (last - first) * at / SIDE, first + (last - first) * (at + count) / SIDE};
  }
  void fetch(int64_t s) const {
    if (!left) return;
    for (int64_t r = first; r < last; r++) {
      auto* at = reinterpret_cast<const char*>(left->half[r / 16] + r % 16 * left->row + s * left->step);
      // GCC takes a function that only prefetches for one without effect and drops the call: hence assembly.
      for (size_t line = 0; line < SIDE * sizeof(T); line += 64) asm volatile("prefetcht1 %0" : : "m"(at[line]));
    }
  }
};

// Right panels: word (s, c) of panel p is words[p * panel + s / 32 * step + (s % 32 / per_word) * row + c].
struct Right {
  const uint32_t* words;
  int64_t row, step, panel;
  const float* thin = nullptr;  // the same for few columns, one after the other, as `thin_columns` makes them
};

#ifdef __AMX_BF16__
inline bool matrix_unit() {
  return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
}

// The matrix unit of this thread, all tiles 16 x 64 bytes, for as long as the object lives.
struct Tiles {
  Tiles() {
    alignas(64) uint8_t config[64] = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16;
    _tile_loadconfig(config);
  }
  ~Tiles() { _tile_release(); }
};

// One block on the matrix unit; with `both` false its right half is left as it is.
template <bool both>
inline void block(const Left<bf16>& a, const uint32_t* b, const Right& right, int64_t from, int64_t to, float* c,
                  bool add, const Ahead<bf16>& ahead) {
  if (add) {
    _tile_loadd(0, c, 128);
    _tile_loadd(2, c + 512, 128);
    if (both) _tile_loadd(1, c + 16, 128);
    if (both) _tile_loadd(3, c + 528, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = from / SIDE; s * SIDE < to; s++) {
    const uint32_t* words = b + s * right.step;
    _tile_loadd(4, a.half[0] + s * a.step, a.row * 2);
    _tile_loadd(6, words, right.row * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (both) _tile_loadd(7, words + 16, right.row * 4);
    if (both) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.half[1] + s * a.step, a.row * 2);
    _tile_dpbf16ps(2, 5, 6);
    if (both) _tile_dpbf16ps(3, 5, 7);
    ahead.fetch(s);
  }
  _tile_stored(0, c, 128);
  _tile_stored(2, c + 512, 128);
  if (both) _tile_stored(1, c + 16, 128);
  if (both) _tile_stored(3, c + 528, 128);
}
#else
inline bool matrix_unit() { return false; }
struct Tiles {
  Tiles() {}
};
template <bool both>
inline void block(const Left<bf16>&, const uint32_t*, const Right&, int64_t, int64_t, float*, bool,
                  const Ahead<bf16>&) {}
#endif

template <bool both>
inline void rows_block(const float* a, const Left<float>& left, const uint32_t* b, const Right& right, int64_t from,
                       int64_t to, float* c, bool add, const Ahead<float>& ahead) {
  // 16 sums hide the latency of an addition; and many rows at once, that of reading weights for few tokens.
  constexpr int rows = both ? 8 : 16;
  Vec sum[rows][2] = {};
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    if (add) sum[i][0] = _mm512_loadu_ps(c + i * SIDE);
    if (add && both) sum[i][1] = _mm512_loadu_ps(c + i * SIDE + 16);
  }
  for (int64_t s = from / SIDE; s * SIDE < to; s++) {
    const float* values = a + s * left.step;
    const float* words = reinterpret_cast<const float*>(b) + s * right.step;
    const int64_t depth = std::min<int64_t>(SIDE, to - s * SIDE);
    for (int64_t k = 0; k < depth; k++) {
      Vec b0 = _mm512_loadu_ps(words + k * right.row), b1 = Vec{};
      if (both) b1 = _mm512_loadu_ps(words + k * right.row + 16);
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        Vec x = _mm512_set1_ps(values[i * left.row + k]);
        sum[i][0] = _mm512_fmadd_ps(x, b0, sum[i][0]);
        if (both) sum[i][1] = _mm512_fmadd_ps(x, b1, sum[i][1]);
      }
    }
    ahead.fetch(s);
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    _mm512_storeu_ps(c + i * SIDE, sum[i][0]);
    if (both) _mm512_storeu_ps(c + i * SIDE + 16, sum[i][1]);
  }
}

// At most THIN columns of a float32 panel, one after the other. The products of few tokens read
// weights as fast as memory gives them only when they read one row after the other.
constexpr int THIN = 16;
inline int64_t thin_stride(int64_t depth) { return round_up(depth, SIDE) + 16; }  // not all in one set of the cache
inline void thin_columns(const float* panel, int64_t depth, float* out) {
  const int64_t stride = thin_stride(depth);
  Words square[16];
  for (int64_t k = 0; k < round_up(depth, SIDE); k += 16) {
    for (int i = 0; i < 16; i++) square[i] = _mm512_loadu_si512(panel + (k + i) * SIDE);
    transpose(square);
    for (int i = 0; i < THIN; i++) _mm512_storeu_si512(out + i * stride + k, square[i]);
  }
}

template <int columns>
inline void thin_block(const Left<float>& a, const float* b, int64_t stride, int64_t depth, float* c) {
  for (int r = 0; r < SIDE; r++) {
    const float* row = a.half[r / 16] + r % 16 * a.row;
    Vec sum[columns] = {};
    for (int64_t k = 0; k < depth; k += 16) {
      Vec x = load(row + k / SIDE * a.step + k % SIDE, first16(depth - k));
#pragma GCC unroll 16
      for (int i = 0; i < columns; i++) sum[i] = _mm512_fmadd_ps(x, _mm512_loadu_ps(b + i * stride + k), sum[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < columns; i++) c[r * SIDE + i] = _mm512_reduce_add_ps(sum[i]);
  }
}

inline void thin_product(const Left<float>& a, const float* b, int64_t columns, int64_t depth, float* c) {
  const int64_t stride = thin_stride(depth);
  if (columns == 1) return thin_block<1>(a, b, stride, depth, c);
  if (columns == 2) return thin_block<2>(a, b, stride, depth, c);
  if (columns <= 4) return thin_block<4>(a, b, stride, depth, c);
  if (columns <= 8) return thin_block<8>(a, b, stride, depth, c);
  thin_block<THIN>(a, b, stride, depth, c);
}
inline void thin_product(const Left<bf16>&, const float*, int64_t, int64_t, float*) {}

// One block on vectors; with `both` false its right half is left as it is.
template <bool both>
inline void block(const Left<float>& a, const uint32_t* b, const Right& right, int64_t from, int64_t to, float* c,
                  bool add, const Ahead<float>& ahead) {
  constexpr int rows = both ? 8 : 16;
  for (int r = 0; r < SIDE; r += rows)
    rows_block<both>(a.half[r / 16] + r % 16 * a.row, a, b, right, from, to, c + r * SIDE, add, ahead.part(r, rows));
}

// c[p] (32 x 32 each) = left (32 x depth) times panel p, or added to what c holds, for `columns` columns of panels.
// Of a last panel of at most 16 columns the right half of c is left as it is. While it computes it fetches the rows of
// `next`, if given; but for few columns memory is the limit, and the processor's own foresight uses it better.
template <class T>
inline void product(const Left<T>& left, const Right& right, int64_t columns, int64_t depth, float* c,
                    bool add = false, const Left<T>* next = nullptr) {
  if (right.thin) return thin_product(left, right.thin, columns, depth, c);
  constexpr int64_t chunk = Kind<T>::chunk * SIDE;
  const int64_t panels = (columns + SIDE - 1) / SIDE;
  for (int64_t from = 0; from < depth; from += chunk) {
    const int64_t to = std::min(depth, from + chunk);
    for (int64_t p = 0; p < panels; p++) {
      const uint32_t* words = right.words + p * right.panel;
      const Ahead<T> ahead{columns > SIDE ? next : nullptr, SIDE * p / panels, SIDE * (p + 1) / panels};
      if (columns - p * SIDE > 16)
        block<true>(left, words, right, from, to, c + p * BLOCK, add || from > 0, ahead);
      else
        block<false>(left, words, right, from, to, c + p * BLOCK, add || from > 0, ahead);
    }
  }
}

}  // namespace crossways
