// Between rows of tokens, which lie scattered, and the panels that products read.
//
// Every function pads with zeros: rows that do not exist, and the columns up to the next multiple of 32.
#pragma once
#include "product.h"

namespace crossways {

// 16 words of each of 16 rows, from element `at` of `width`; rows that are null are zero.
template <class T>
inline void load_square(const T* const rows[16], int64_t at, int64_t width, Words out[16]) {
  constexpr int per = Kind<T>::per_word;
  const __mmask32 mask = first32((width - at) * (2 / per));
  for (int i = 0; i < 16; i++)
    out[i] = rows[i] ? _mm512_maskz_loadu_epi16(mask, rows[i] + at) : _mm512_setzero_si512();
}

// 32 rows to a panel of words [width / per_word][32], transposed.
template <class T>
inline void transpose_panel(const T* const rows[SIDE], int64_t width, uint32_t* panel) {
  constexpr int per = Kind<T>::per_word;
  Words square[16];
  for (int64_t at = 0; at < round_up(width, SIDE); at += 16 * per)
    for (int half = 0; half < 2; half++) {
      load_square(rows + 16 * half, at, width, square);
      transpose(square);
      for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (at / per + i) * SIDE + 16 * half, square[i]);
    }
}

// Sixteen words that pair values of two rows; rows that are null are zero.
inline Words pair_of(const bf16* low, const bf16* high, int64_t at, __mmask16 mask) {
  const Words a = low ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, low + at)) : Words{};
  const Words b = high ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, high + at)) : Words{};
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

// 32 rows to words that pair neighbouring rows: [width / 32] panels of [32 / per_word][32], `panel` words apart. A line
// of a row is read at once: rows lie so far apart that it may not be in the first-level cache a little later.
inline void pair_rows(const bf16* const rows[SIDE], int64_t width, uint32_t* words, int64_t panel) {
  for (int64_t at = 0; at < width; at += SIDE) {
    const __mmask16 first = first16(width - at), second = first16(width - at - 16);
    uint32_t* out = words + at / SIDE * panel;
    for (int i = 0; i < SIDE; i += 2, out += SIDE) {
      _mm512_storeu_si512(out, pair_of(rows[i], rows[i + 1], at, first));
      _mm512_storeu_si512(out + 16, pair_of(rows[i], rows[i + 1], at + 16, second));
    }
  }
}
inline void pair_rows(const float* const rows[SIDE], int64_t width, uint32_t* words, int64_t panel) {
  for (int64_t at = 0; at < round_up(width, SIDE); at += 16)
    for (int i = 0; i < SIDE; i++) {
      Vec x = rows[i] ? load(rows[i] + at, first16(width - at)) : Vec{};
      _mm512_storeu_ps(words + at / SIDE * panel + at % SIDE + i * SIDE, x);
    }
}

// A panel of words [width / per_word][32] to left rows [width][32]: word pairs of one column to values of one row.
inline const float* left_rows(const uint32_t* panel, int64_t, float*) { return reinterpret_cast<const float*>(panel); }
inline const bf16* left_rows(const uint32_t* panel, int64_t width, bf16* out) {
  for (int64_t i = 0; i < width / 2; i++)
    for (int half = 0; half < 2; half++) {
      Words pair = _mm512_loadu_si512(panel + i * SIDE + 16 * half);
      _mm256_storeu_si256((__m256i*)(out + 2 * i * SIDE + 16 * half), _mm512_cvtepi32_epi16(pair));
      _mm256_storeu_si256((__m256i*)(out + (2 * i + 1) * SIDE + 16 * half),
                          _mm512_cvtepi32_epi16(_mm512_srli_epi32(pair, 16)));
    }
  return out;
}

// `count` rows and `width` columns of a matrix to 32 left rows, [steps][32][32], zero where the matrix ends.
template <class T>
inline Left<T> pack_left(const T* const half[2], const int64_t count[2], int64_t stride, int64_t width, T* out) {
  std::memset(out, 0, round_up(width, SIDE) * SIDE * sizeof(T));
  for (int h = 0; h < 2; h++)
    for (int64_t r = 0; r < std::min<int64_t>(count[h], 16); r++)
      for (int64_t at = 0; at < width; at += SIDE)
        std::memcpy(out + at * SIDE + (16 * h + r) * SIDE, half[h] + r * stride + at,
                    std::min<int64_t>(SIDE, width - at) * sizeof(T));
  return {{out, out + 16 * SIDE}, SIDE, BLOCK};
}

// 16 vectors of 16 rows' values each to those rows, `row` values from one to the next.
inline void put_turned(float* rows, int64_t row, const Vec x[16]) {
  Words square[16];
  for (int i = 0; i < 16; i++) square[i] = _mm512_castps_si512(x[i]);
  transpose(square);
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(rows + i * row, square[i]);
}
inline void put_turned(bf16* rows, int64_t row, const Vec x[16]) {
  Words square[16] = {};
  for (int i = 0; i < 8; i++) square[i] = pair_words(x[2 * i], x[2 * i + 1]);
  transpose(square);
  for (int i = 0; i < 16; i++) _mm256_storeu_si256((__m256i*)(rows + i * row), _mm512_castsi512_si256(square[i]));
}

// The other way round: 16 values of each of 16 rows to vectors.
inline void get_turned(const float* rows, int64_t row, Vec x[16]) {
  Words square[16];
  for (int i = 0; i < 16; i++) square[i] = _mm512_loadu_si512(rows + i * row);
  transpose(square);
  for (int i = 0; i < 16; i++) x[i] = _mm512_castsi512_ps(square[i]);
}

// Write up to 32 values.
inline void keep_row(float* to, Vec a, Vec b, int64_t columns) {
  store(to, a, first16(columns));
  store(to + 16, b, first16(columns - 16));
}
inline void keep_row(bf16* to, Vec a, Vec b, int64_t columns) {
  const Words row = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a)), narrow(b), 1);
  _mm512_mask_storeu_epi16(to, first32(columns), row);
}

// The same for values that are not read again soon: past the caches where whole lines are written.
inline void put_row(float* to, Vec a, Vec b, int64_t columns) {
  if (columns >= SIDE && reinterpret_cast<uintptr_t>(to) % 64 == 0) {
    _mm512_stream_ps(to, a);
    _mm512_stream_ps(to + 16, b);
  } else {
    keep_row(to, a, b, columns);
  }
}
inline void put_row(bf16* to, Vec a, Vec b, int64_t columns) {
  const Words row = _mm512_inserti64x4(_mm512_castsi256_si512(narrow(a)), narrow(b), 1);
  if (columns >= SIDE && reinterpret_cast<uintptr_t>(to) % 64 == 0)
    _mm512_stream_si512(reinterpret_cast<Words*>(to), row);
  else
    keep_row(to, a, b, columns);
}

// Columns of a block are tokens: add each to 32 values of its row; rows that are null do not exist.
inline void add_columns(const float* c, float* const rows[SIDE], int64_t at, int64_t width) {
  Words square[16];
  for (int right = 0; right < 2; right++)
    for (int down = 0; down < 2; down++) {
      const __mmask16 mask = first16(width - at - 16 * down);
      if (!mask) continue;
      for (int i = 0; i < 16; i++) square[i] = _mm512_loadu_si512(c + (16 * down + i) * SIDE + 16 * right);
      transpose(square);
      for (int i = 0; i < 16; i++)
        if (float* row = rows[16 * right + i]; row) {
          row += at + 16 * down;
          store(row, _mm512_add_ps(load(row, mask), _mm512_castsi512_ps(square[i])), mask);
        }
    }
}

}  // namespace crossways
