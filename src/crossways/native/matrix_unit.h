// One block of 32 x 32 in bfloat16, on the matrix unit (AMX), 32 summed values a step.
#pragma once
#include <sys/syscall.h>
#include <unistd.h>

#include "operands.h"

namespace crossways {

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

// The upper half of a block.
template <bool both>
inline void half_block(const Left<bf16>& a, const uint32_t* b, const Right& right, int64_t from, int64_t to,
                       const Out& out, bool add, Ahead& ahead) {
  const int64_t line = out.row * 4;
  if (add) {
    _tile_loadd(0, out.at, line);
    if (both) _tile_loadd(1, out.at + 16, line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
  }
  for (int64_t s = from / SIDE; s * SIDE < to; s++) {
    const uint32_t* words = b + s * right.step;
    _tile_loadd(4, a.half[0] + s * a.step, 2 * a.row);
    _tile_loadd(6, words, right.row * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (both) _tile_loadd(7, words + 16, right.row * 4);
    if (both) _tile_dpbf16ps(1, 4, 7);
    ahead.fetch();
  }
  _tile_stored(0, out.at, line);
  if (both) _tile_stored(1, out.at + 16, line);
}

// One block on the matrix unit, of `rows` rows; with `both` false its right half is left as it is.
template <bool both>
inline void block(const Left<bf16>& a, const uint32_t* b, const Right& right, int64_t from, int64_t to,
                  const Out& out, bool add, Ahead& ahead, int64_t rows) {
  if (rows <= 16) return half_block<both>(a, b, right, from, to, out, add, ahead);
  float* const c = out.at;
  const int64_t line = out.row * 4;
  if (add) {
    _tile_loadd(0, c, line);
    _tile_loadd(2, c + 16 * out.row, line);
    if (both) _tile_loadd(1, c + 16, line);
    if (both) _tile_loadd(3, c + 16 * out.row + 16, line);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = from / SIDE; s * SIDE < to; s++) {
    const uint32_t* words = b + s * right.step;
    const bool tail = a.tail && (s + 1) * SIDE > to;
    const int64_t row = 2 * (tail ? SIDE : a.row);
    _tile_loadd(4, tail ? a.tail : a.half[0] + s * a.step, row);
    _tile_loadd(6, words, right.row * 4);
    _tile_dpbf16ps(0, 4, 6);
    if (both) _tile_loadd(7, words + 16, right.row * 4);
    if (both) _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, tail ? a.tail + BLOCK / 2 : a.half[1] + s * a.step, row);
    _tile_dpbf16ps(2, 5, 6);
    if (both) _tile_dpbf16ps(3, 5, 7);
    ahead.fetch();
  }
  _tile_stored(0, c, line);
  _tile_stored(2, c + 16 * out.row, line);
  if (both) _tile_stored(1, c + 16, line);
  if (both) _tile_stored(3, c + 16 * out.row + 16, line);
}
#else
inline bool matrix_unit() { return false; }
struct Tiles {
  Tiles() {}
};
template <bool both>
inline void block(const Left<bf16>&, const uint32_t*, const Right&, int64_t, int64_t, const Out&, bool, Ahead&,
                  int64_t) {}
#endif

}  // namespace crossways
