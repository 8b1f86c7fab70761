// The elementwise functions between an expert's two matrices, and their slopes.
#pragma once
#include <type_traits>

#include "simd.h"

namespace crossways {

enum Function { SILU, GELU, RELU };

// f(x).
template <Function function>
inline Vec apply(Vec x) {
  const Vec one = _mm512_set1_ps(1.0f);
  switch (function) {
    case SILU: return _mm512_mul_ps(x, reciprocal(_mm512_add_ps(one, exp(_mm512_sub_ps(Vec{}, x)))));
    case GELU: {
      Vec half = _mm512_mul_ps(x, _mm512_set1_ps(0.5f));
      return _mm512_fmadd_ps(half, erf(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752f))), half);
    }
    default: return _mm512_max_ps(Vec{}, x);
  }
}

// f(x) and f'(x).
template <Function function>
inline Vec apply(Vec x, Vec& slope) {
  const Vec one = _mm512_set1_ps(1.0f);
  switch (function) {
    case SILU: {
      Vec s = reciprocal(_mm512_add_ps(one, exp(_mm512_sub_ps(Vec{}, x))));
      Vec y = _mm512_mul_ps(x, s);
      slope = _mm512_fmadd_ps(y, _mm512_sub_ps(one, s), s);
      return y;
    }
    case GELU: {
      Vec cdf = _mm512_fmadd_ps(erf(_mm512_mul_ps(x, _mm512_set1_ps(0.70710678118654752f))), _mm512_set1_ps(0.5f),
                                _mm512_set1_ps(0.5f));
      Vec density = _mm512_mul_ps(exp(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f))),
                                  _mm512_set1_ps(0.39894228040143268f));
      slope = _mm512_fmadd_ps(x, density, cdf);
      return _mm512_mul_ps(x, cdf);
    }
    default:
      slope = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, Vec{}, _CMP_NLE_UQ), one);
      return _mm512_max_ps(Vec{}, x);
  }
}

// Call `run` with the function, known when compiling.
template <class Run>
inline void with_function(int64_t function, Run&& run) {
  switch (function) {
    case SILU: return run(std::integral_constant<Function, SILU>{});
    case GELU: return run(std::integral_constant<Function, GELU>{});
    default: return run(std::integral_constant<Function, RELU>{});
  }
}

}  // namespace crossways
