// Small matrix products that keep their results in registers. Every element of a result is computed by the
// same operations in the same order whatever the tile around it, so a row's answer does not depend on how
// many rows are computed with it.
#pragma once

#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {

// rows of a tile of dots, and keys of it
constexpr int kDotRows = kLanes == 16 ? 4 : 2;
constexpr int kDotKeys = 4;

// rows of a tile of weighted sums, and vectors in each of its rows
constexpr int kSumRows = 4;
constexpr int kSumVecs = kLanes == 16 ? 4 : 2;

// [sum of acc[0], sum of acc[1], ...] of one row, each still spread over kLanes / 4 lanes
DSOPT_INLINE Vec fold_row(const Vec* acc) {
  return add_pairs(add_pairs(acc[0], acc[1]), add_pairs(acc[2], acc[3]));
}

// stores the first 4 * rows floats of v at out, 4 a row
template <int ROWS>
DSOPT_INLINE void store_rows(Vec v, float* out, int64_t out_stride) {
  float part[kLanes];
  store(part, v);
  DSOPT_UNROLL
  for (int i = 0; i < ROWS; ++i) __builtin_memcpy(out + i * out_stride, part + 4 * i, 4 * sizeof(float));
}

// out[i][j] = sum of acc[i][j] for i < ROWS (1 or kDotRows), j < 4
template <int ROWS>
DSOPT_INLINE void store_dots(const Vec (&acc)[ROWS][kDotKeys], float* out, int64_t out_stride) {
  Vec rows[4] = {};
  DSOPT_UNROLL
  for (int i = 0; i < ROWS; ++i) rows[i] = fold_row(acc[i]);
  if constexpr (kLanes == 16) {
    store_rows<ROWS>(add_pairs(add_pairs(rows[0], rows[1]), add_pairs(rows[2], rows[3])), out, out_stride);
  } else if constexpr (kLanes == 8) {
    store_rows<ROWS>(add_pairs(rows[0], rows[1]), out, out_stride);
  } else {
    DSOPT_UNROLL
    for (int i = 0; i < ROWS; ++i) store_rows<1>(rows[i], out + i * out_stride, out_stride);
  }
}

// out[i][j] = sum_k a[i][k] * b[j][k] for i < ROWS (1 or kDotRows), j < 4
// a: float32 rows, zero from k up to a multiple of kLanes; b[j]: rows of T, k long
// AHEAD: fetch what lies `ahead` elements further on in b
template <int ROWS, bool AHEAD = false, class T>
DSOPT_INLINE void dot_tile(const float* a, int64_t a_stride, const T* const* b, int64_t k, float* out,
                           int64_t out_stride, int64_t ahead = 0) {
  Vec acc[ROWS][kDotKeys];
  DSOPT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    DSOPT_UNROLL
    for (int j = 0; j < kDotKeys; ++j) acc[i][j] = Vec{};
  }
  const T* const b0 = b[0];
  const T* const b1 = b[1];
  const T* const b2 = b[2];
  const T* const b3 = b[3];
  const auto fetch = [&](const T* p) __attribute__((always_inline)) {
    if constexpr (AHEAD) __builtin_prefetch(p + ahead);
  };
  const auto step = [&](int64_t at, Vec v0, Vec v1, Vec v2, Vec v3) __attribute__((always_inline)) {
    fetch(b0 + at), fetch(b1 + at), fetch(b2 + at), fetch(b3 + at);
    DSOPT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = load(a + i * a_stride + at);
      acc[i][0] = madd(x, v0, acc[i][0]);
      acc[i][1] = madd(x, v1, acc[i][1]);
      acc[i][2] = madd(x, v2, acc[i][2]);
      acc[i][3] = madd(x, v3, acc[i][3]);
    }
  };
  int64_t at = 0;
  for (; at + kLanes <= k; at += kLanes) step(at, load(b0 + at), load(b1 + at), load(b2 + at), load(b3 + at));
  if (at < k) {
    const int64_t n = k - at;
    step(at, load_some(b0 + at, n), load_some(b1 + at, n), load_some(b2 + at, n), load_some(b3 + at, n));
  }
  store_dots<ROWS>(acc, out, out_stride);
}

// out[i][:] = out[i][:] * keep[i] + sum_k a[i][k] * b[k][:] over VECS vectors of columns, i < ROWS
// AHEAD: fetch what lies `ahead` elements further on in b
template <int ROWS, int VECS, bool AHEAD = false, class T>
DSOPT_INLINE void sum_tile(const float* a, int64_t a_stride, int64_t k, const T* b, int64_t b_stride,
                           const float* keep, float* const* out, int64_t ahead = 0) {
  Vec acc[ROWS][VECS];
  DSOPT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) acc[i][j] = load(out[i] + j * kLanes) * keep[i];
  }
  for (int64_t at = 0; at < k; ++at) {
    Vec v[VECS];
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) {
      v[j] = load(b + at * b_stride + j * kLanes);
      if constexpr (AHEAD) __builtin_prefetch(b + at * b_stride + j * kLanes + ahead);
    }
    DSOPT_UNROLL
    for (int i = 0; i < ROWS; ++i) {
      const Vec x = splat(a[i * a_stride + at]);
      DSOPT_UNROLL
      for (int j = 0; j < VECS; ++j) acc[i][j] = madd(x, v[j], acc[i][j]);
    }
  }
  DSOPT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) store(out[i] + j * kLanes, acc[i][j]);
  }
}

// sum_tile over `columns` columns, any number of them
template <int ROWS, int VECS, bool AHEAD = false, class T>
DSOPT_INLINE void sum_rows(const float* a, int64_t a_stride, int64_t k, const T* b, int64_t b_stride,
                           int64_t columns, const float* keep, float* const* out, int64_t ahead = 0) {
  int64_t c = 0;
  float* at[ROWS];
  const auto advance = [&]() __attribute__((always_inline)) {
    DSOPT_UNROLL
    for (int i = 0; i < ROWS; ++i) at[i] = out[i] + c;
  };
  for (; c + VECS * kLanes <= columns; c += VECS * kLanes) {
    advance();
    sum_tile<ROWS, VECS, AHEAD>(a, a_stride, k, b + c, b_stride, keep, at, ahead);
  }
  for (; c + kLanes <= columns; c += kLanes) {
    advance();
    sum_tile<ROWS, 1>(a, a_stride, k, b + c, b_stride, keep, at);
  }
  for (; c < columns; ++c) {
    for (int i = 0; i < ROWS; ++i) {
      float acc = out[i][c] * keep[i];
      for (int64_t j = 0; j < k; ++j) acc += a[i * a_stride + j] * to_float(b[j * b_stride + c]);
      out[i][c] = acc;
    }
  }
}

}  // namespace dsopt::DSOPT_VARIANT
