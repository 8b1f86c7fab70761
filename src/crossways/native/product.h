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

// Where the two halves of 32 left rows lie: element (r, s) of half h is half[h][r * row + s / 32 * step + s % 32 * next].
// The matrix unit needs next = 1.
template <class T>
struct Left {
  const T* half[2];
  int64_t row, step, next = 1;
};

// Right panels: word (s, c) of panel p is words[p * panel + s / 32 * step + (s % 32 / per_word) * row + c].
struct Right {
  const uint32_t* words;
  int64_t row, step, panel;
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

inline void block(const Left<bf16>& a, const uint32_t* b, const Right& right, int from, int to, float* c, bool add) {
  if (add) {
    _tile_loadd(0, c, 128);
    _tile_loadd(1, c + 16, 128);
    _tile_loadd(2, c + 512, 128);
    _tile_loadd(3, c + 528, 128);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int s = from; s < to; s++) {
    const uint32_t* words = b + s * right.step;
    _tile_loadd(4, a.half[0] + s * a.step, a.row * 2);
    _tile_loadd(6, words, right.row * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, words + 16, right.row * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.half[1] + s * a.step, a.row * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, 128);
  _tile_stored(1, c + 16, 128);
  _tile_stored(2, c + 512, 128);
  _tile_stored(3, c + 528, 128);
}
#else
inline bool matrix_unit() { return false; }
struct Tiles {};
inline void block(const Left<bf16>&, const uint32_t*, const Right&, int, int, float*, bool) {}
#endif

template <int rows>
inline void rows_block(const float* a, const Left<float>& left, const float* b, const Right& right, int from, int to,
                       float* c, bool add) {
  Vec sum[rows][2];
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    sum[i][0] = add ? _mm512_loadu_ps(c + i * SIDE) : _mm512_setzero_ps();
    sum[i][1] = add ? _mm512_loadu_ps(c + i * SIDE + 16) : _mm512_setzero_ps();
  }
  for (int s = from; s < to; s++) {
    const float *values = a + s * left.step, *words = b + s * right.step;
    for (int k = 0; k < SIDE; k++) {
      Vec b0 = _mm512_loadu_ps(words + k * right.row), b1 = _mm512_loadu_ps(words + k * right.row + 16);
#pragma GCC unroll 16
      for (int i = 0; i < rows; i++) {
        Vec x = _mm512_set1_ps(values[i * left.row + k * left.next]);
        sum[i][0] = _mm512_fmadd_ps(x, b0, sum[i][0]);
        sum[i][1] = _mm512_fmadd_ps(x, b1, sum[i][1]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < rows; i++) {
    _mm512_storeu_ps(c + i * SIDE, sum[i][0]);
    _mm512_storeu_ps(c + i * SIDE + 16, sum[i][1]);
  }
}

inline void block(const Left<float>& a, const uint32_t* b, const Right& right, int from, int to, float* c, bool add) {
  for (int half = 0; half < 2; half++)
    for (int r = 0; r < 16; r += 8)
      rows_block<8>(a.half[half] + r * a.row, a, reinterpret_cast<const float*>(b), right, from, to,
                    c + (half * 16 + r) * SIDE, add);
}

// c[p] (32 x 32 each) = left (32 x 32 steps) times panel p, or added to what c holds.
template <class T>
inline void product(const Left<T>& left, const Right& right, int panels, int steps, float* c, bool add = false) {
  for (int from = 0; from < steps; from += Kind<T>::chunk) {
    int to = std::min(steps, from + Kind<T>::chunk);
    for (int p = 0; p < panels; p++)
      block(left, right.words + p * right.panel, right, from, to, c + p * BLOCK, add || from > 0);
  }
}

}  // namespace crossways
