// Products of a block of keys with a panel of rows. Several vectors of rows lie side by side in lanes: an element of a
// key meets all of them, and no sum across lanes is needed. With one vector of rows that would be a load for each
// multiply-add, more than processors sustain; rows then lie one behind another and meet the keys in dot products.
// Either way the results lie side by side in lanes, and an element of them is computed by the same operations in the
// same order whatever the tile around it.
#pragma once

#include "dsopt/panels.h"
#include "dsopt/simd.h"
#include "dsopt/tiles.h"

namespace dsopt::DSOPT_VARIANT {

// A block of `keys` widened keys lies in slices of kWide elements of each; a constant distance of keys, an odd number
// of cache lines.
constexpr int64_t kWide = 64;
constexpr int64_t kWideStride = kWide + 16;

constexpr int64_t wide_slices(int64_t width) { return (width + kWide - 1) / kWide; }

// where element i of key t lies in a block of `keys` keys
DSOPT_INLINE int64_t wide_at(int64_t keys, int64_t t, int64_t i) {
  return (i / kWide * keys + t) * kWideStride + i % kWide;
}

// out[t][:] = (more ? out[t][:] : 0) + sum_i slice[t][i] * rows[i][:] for t < KEYS, i < width and VECS vectors of rows
template <int KEYS, int VECS>
void key_tile(const float* slice, const float* rows, int64_t width, bool more, float* out) {
  Vec acc[KEYS][VECS];
  DSOPT_UNROLL
  for (int t = 0; t < KEYS; ++t) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) acc[t][j] = more ? load(out + (t * VECS + j) * kLanes) : Vec{};
  }
  for (int64_t i = 0; i < width; ++i, rows += VECS * kLanes) {
    Vec v[VECS];
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) v[j] = load(rows + j * kLanes);
    DSOPT_UNROLL
    for (int t = 0; t < KEYS; ++t) {
      const Vec x = splat(slice[t * kWideStride + i]);
      DSOPT_UNROLL
      for (int j = 0; j < VECS; ++j) acc[t][j] = madd(x, v[j], acc[t][j]);
    }
  }
  DSOPT_UNROLL
  for (int t = 0; t < KEYS; ++t) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) store(out + (t * VECS + j) * kLanes, acc[t][j]);
  }
}

// keys whose products with two to kTileVecs vectors of rows fill the registers
constexpr int kKeysOf[] = {0, 0, kTileVecs == 2 ? 6 : 8, 8, 6};

// key_tile over 64 keys: whole tiles, and one of 4 where they leave that many; before(t, keys) comes ahead of each
template <int VECS, class F>
DSOPT_INLINE void key_products(const float* slice, const float* rows, int64_t width, bool more, float* out,
                               F&& before) {
  constexpr int64_t keys = kKeysOf[VECS], lanes = VECS * kLanes;
  static_assert(64 % keys == 0 || 64 % keys == 4);
  int64_t t = 0;
  for (; t + keys <= 64; t += keys) {
    before(t, keys);
    key_tile<keys, VECS>(slice + t * kWideStride, rows, width, more, out + t * lanes);
  }
  if (t < 64) {
    before(t, 4);
    key_tile<4, VECS>(slice + t * kWideStride, rows, width, more, out + t * lanes);
  }
}

// out[t][r] = <block[t], rows[r]> for t < kDotRows, r < kDotKeys
// block: slices as wide_at of `keys` keys; rows: `distance` apart, zero from width up to a multiple of kLanes, as keys
inline void dot_keys(const float* block, int64_t keys, const float* rows, int64_t distance, int64_t width,
                     float* out) {
  Vec acc[kDotRows][kDotKeys];
  DSOPT_UNROLL
  for (int t = 0; t < kDotRows; ++t) {
    DSOPT_UNROLL
    for (int r = 0; r < kDotKeys; ++r) acc[t][r] = Vec{};
  }
  for (; width > 0; width -= kWide, block += keys * kWideStride, rows += kWide) {
    for (int64_t i = 0; i < min(width, kWide); i += kLanes) {
      Vec v[kDotKeys];
      DSOPT_UNROLL
      for (int r = 0; r < kDotKeys; ++r) v[r] = load(rows + r * distance + i);
      DSOPT_UNROLL
      for (int t = 0; t < kDotRows; ++t) {
        const Vec x = load(block + t * kWideStride + i);
        DSOPT_UNROLL
        for (int r = 0; r < kDotKeys; ++r) acc[t][r] = madd(x, v[r], acc[t][r]);
      }
    }
  }
  store_dots<kDotRows>(acc, out, kLanes);
}

// out[r][:] = out[r][:] * keep[r] + sum_t weights[t * distance + r] * block[t][:] for r < ROWS, t < count, over VECS
// vectors of a key
template <int ROWS, int VECS>
void weigh_tile(const float* weights, int64_t distance, int64_t count, const float* block, const float* keep,
                float* out, int64_t out_stride) {
  Vec acc[ROWS][VECS];
  DSOPT_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) acc[r][j] = load(out + r * out_stride + j * kLanes) * keep[r];
  }
  for (int64_t t = 0; t < count; ++t, weights += distance, block += kWideStride) {
    Vec v[VECS];
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) v[j] = load(block + j * kLanes);
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const Vec x = splat(weights[r]);
      DSOPT_UNROLL
      for (int j = 0; j < VECS; ++j) acc[r][j] = madd(x, v[j], acc[r][j]);
    }
  }
  DSOPT_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) store(out + r * out_stride + j * kLanes, acc[r][j]);
  }
}

// weigh_tile of rows <= kTileRows
template <int VECS>
void weigh_rows(int64_t rows, const float* weights, int64_t distance, int64_t count, const float* block,
                const float* keep, float* out, int64_t out_stride) {
  switch (rows) {
    case 1: return weigh_tile<1, VECS>(weights, distance, count, block, keep, out, out_stride);
    case 2: return weigh_tile<2, VECS>(weights, distance, count, block, keep, out, out_stride);
    case 3: return weigh_tile<3, VECS>(weights, distance, count, block, keep, out, out_stride);
    case 4: return weigh_tile<4, VECS>(weights, distance, count, block, keep, out, out_stride);
    case 5: return weigh_tile<5, VECS>(weights, distance, count, block, keep, out, out_stride);
    case 6: return weigh_tile<6, VECS>(weights, distance, count, block, keep, out, out_stride);
  }
}

}  // namespace dsopt::DSOPT_VARIANT
