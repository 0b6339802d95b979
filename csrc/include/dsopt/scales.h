// The scales of FP8 tensors, and their elements widened in order.
#pragma once

#include "dsopt/fp8.h"
#include "dsopt/kernels.h"
#include "dsopt/panels.h"

namespace dsopt::DSOPT_VARIANT {

// those of matrix `index` of a stack; null stays null
DSOPT_INLINE Scales scales_of(const Scales& stack, int64_t index) {
  Scales own = stack;
  const int64_t size = stack.exponents ? 1 : sizeof(float);
  if (own.data) own.data = static_cast<const char*>(own.data) + index * own.stride0 * size;
  return own;
}

// the scale of a block
DSOPT_INLINE float scale_at(const Scales& s, int64_t row, int64_t column) {
  const int64_t at = row * s.stride1 + column;
  if (!s.exponents) return static_cast<const float*>(s.data)[at];
  const uint32_t e = static_cast<const uint8_t*>(s.data)[at];
  const uint32_t bits = e == 0 ? 0x00400000u : e == 255 ? 0x7fc00000u : e << 23;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// to[i] = x[i] * scale, i < n
inline void widen_scaled(const Fp8* x, float scale, int64_t n, float* to) {
  const Vec factor = splat(scale);
  Vec v[4];
  const int64_t whole = n / kFp8Step * kFp8Step;
  for (int64_t i = 0; i < whole; i += kFp8Step) {
    widen(x + i, v);
    DSOPT_UNROLL
    for (int half = 0; half < 4; half += 2) {
      store(to + i + half * kLanes, riffle_low(v[half], v[half + 1]) * factor);
      store(to + i + (half + 1) * kLanes, riffle_high(v[half], v[half + 1]) * factor);
    }
  }
  for (int64_t i = whole; i < n; ++i) to[i] = to_float(x[i]) * scale;
}

// to[i] = x[i] * its scale, i < n; x is row `row` of what the scales belong to
inline void widen_scaled(const Fp8* x, const Scales& s, int64_t row, int64_t n, float* to) {
  const int64_t of = row / s.rows;
  for (int64_t i = 0, column = 0; i < n; i += s.columns, ++column) {
    widen_scaled(x + i, scale_at(s, of, column), min(s.columns, n - i), to + i);
  }
}

}  // namespace dsopt::DSOPT_VARIANT
