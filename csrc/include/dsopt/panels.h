// Matrix products for many rows: the right operand is packed in panels of kPanel columns, which stream from the
// second-level cache, while a tile of results stays in registers. An element of a result is one chain of
// multiply-adds in the order of the depth, whatever the tile around it.
#pragma once

#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {

// a tile of results: 6 rows of 4 vectors fill 24 of 32 registers, of 2 vectors 12 of 16
constexpr int kTileRows = 6;
constexpr int kTileVecs = kLanes == 16 ? 4 : 2;
constexpr int kPanel = kTileVecs * kLanes;

// The left operand lies in slices of kSlice elements of each of the tile's rows; a constant distance of rows,
// an odd number of cache lines.
constexpr int64_t kSlice = 256;
constexpr int64_t kTileStride = kSlice + 16;

constexpr int64_t slices(int64_t depth) { return (depth + kSlice - 1) / kSlice; }
// floats of a left operand of kTileRows rows
constexpr int64_t tile_size(int64_t depth) { return slices(depth) * kTileRows * kTileStride; }

// where element k of row i of a left operand lies
DSOPT_INLINE int64_t tile_at(int64_t i, int64_t k) {
  return (k / kSlice * kTileRows + i) * kTileStride + k % kSlice;
}

// out[i][:] = (KEEP ? out[i][:] * keep[i] : 0) + sum_k a[i][k] * panel[k][:] over VECS vectors, k < depth
template <int ROWS, int VECS, bool KEEP>
void panel_tile(const float* a, const float* panel, int64_t depth, const float* keep, float* out,
                int64_t out_stride) {
  // far enough to hide the second-level cache, near enough to stay in the first
  constexpr int64_t ahead = 8 * kPanel;
  Vec acc[ROWS][VECS];
  DSOPT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) acc[i][j] = KEEP ? load(out + i * out_stride + j * kLanes) * keep[i] : Vec{};
  }
  for (; depth > 0; depth -= kSlice, a += kTileRows * kTileStride) {
    const int64_t end = min(depth, kSlice);
    for (int64_t k = 0; k < end; ++k, panel += kPanel) {
      Vec v[VECS];
      DSOPT_UNROLL
      for (int j = 0; j < VECS; ++j) {
        v[j] = load(panel + j * kLanes);
        if (j * kLanes % 16 == 0) __builtin_prefetch(panel + ahead + j * kLanes);
      }
      DSOPT_UNROLL
      for (int i = 0; i < ROWS; ++i) {
        const Vec x = splat(a[i * kTileStride + k]);
        DSOPT_UNROLL
        for (int j = 0; j < VECS; ++j) acc[i][j] = madd(x, v[j], acc[i][j]);
      }
    }
  }
  DSOPT_UNROLL
  for (int i = 0; i < ROWS; ++i) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) store(out + i * out_stride + j * kLanes, acc[i][j]);
  }
}

// panel_tile of rows <= kTileRows
template <int VECS, bool KEEP>
void panel_rows(int64_t rows, const float* a, const float* panel, int64_t depth, const float* keep, float* out,
                int64_t out_stride) {
  switch (rows) {
    case 1: return panel_tile<1, VECS, KEEP>(a, panel, depth, keep, out, out_stride);
    case 2: return panel_tile<2, VECS, KEEP>(a, panel, depth, keep, out, out_stride);
    case 3: return panel_tile<3, VECS, KEEP>(a, panel, depth, keep, out, out_stride);
    case 4: return panel_tile<4, VECS, KEEP>(a, panel, depth, keep, out, out_stride);
    case 5: return panel_tile<5, VECS, KEEP>(a, panel, depth, keep, out, out_stride);
    case 6: return panel_tile<6, VECS, KEEP>(a, panel, depth, keep, out, out_stride);
  }
}

// out[i][:] = sum_k a[i][k] * panel[k][:] for at least the first `columns` columns
inline void panel_product(int64_t rows, const float* a, const float* panel, int64_t depth, int64_t columns,
                          float* out, int64_t out_stride) {
  const auto product = columns > kPanel / 2 ? panel_rows<kTileVecs, false> : panel_rows<kTileVecs / 2, false>;
  product(rows, a, panel, depth, nullptr, out, out_stride);
}

// out[i][:] = out[i][:] * keep[i] + sum_k a[i][k] * panel[k][:]
inline void panel_sum(int64_t rows, const float* a, const float* panel, int64_t depth, const float* keep, float* out,
                      int64_t out_stride) {
  panel_rows<kTileVecs, true>(rows, a, panel, depth, keep, out, out_stride);
}

// [a0, b0, a1, b1, ...] of the first half of the lanes, and of the second
#if defined(__clang__)
#define DSOPT_PICK(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DSOPT_PICK(...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif
DSOPT_INLINE Vec riffle_low(Vec a, Vec b) {
#if defined(__AVX512F__)
  return DSOPT_PICK(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
#elif defined(__AVX2__)
  return DSOPT_PICK(0, 8, 1, 9, 2, 10, 3, 11);
#else
  return DSOPT_PICK(0, 4, 1, 5);
#endif
}
DSOPT_INLINE Vec riffle_high(Vec a, Vec b) {
#if defined(__AVX512F__)
  return DSOPT_PICK(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return DSOPT_PICK(4, 12, 5, 13, 6, 14, 7, 15);
#else
  return DSOPT_PICK(2, 6, 3, 7);
#endif
}
#undef DSOPT_PICK

// to[c][r] = from[r][c] for r < kLanes, c < columns; `from` has kLanes columns at least
template <class T>
DSOPT_INLINE void transpose_block(const T* from, int64_t from_stride, int64_t columns, float* to,
                                  int64_t to_stride) {
  Vec a[kLanes], b[kLanes];
  DSOPT_UNROLL
  for (int r = 0; r < kLanes; ++r) a[r] = load(from + r * from_stride);
  DSOPT_UNROLL
  for (int n = 1; n < kLanes; n *= 2) {
    DSOPT_UNROLL
    for (int r = 0; r < kLanes / 2; ++r) {
      b[2 * r] = riffle_low(a[r], a[r + kLanes / 2]);
      b[2 * r + 1] = riffle_high(a[r], a[r + kLanes / 2]);
    }
    DSOPT_UNROLL
    for (int r = 0; r < kLanes; ++r) a[r] = b[r];
  }
  DSOPT_UNROLL
  for (int c = 0; c < kLanes; ++c) {
    if (c < columns) store(to + c * to_stride, a[c]);
  }
}

// panels of columns r from a matrix whose rows they are: panel[r / kPanel][c][r % kPanel] = from[r][c], zero from
// `rows` up to a multiple of kPanel. `depth` of the panels is at least `columns`; rows of `to` beyond stay as they are.
template <class T>
void pack_panels(const T* from, int64_t from_stride, int64_t rows, int64_t columns, float* to, int64_t depth) {
  for (int64_t r = 0; r < round_up(rows, kPanel); r += kLanes) {
    float* panel = to + r / kPanel * depth * kPanel + r % kPanel;
    for (int64_t c = 0; c < columns; c += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= columns) {
        const T* block = from + r * from_stride + c;
        for (int64_t i = kLanes; i < min(rows - r, 2 * kLanes); ++i) __builtin_prefetch(block + i * from_stride);
        transpose_block(block, from_stride, kLanes, panel + c * kPanel, kPanel);
        continue;
      }
      T part[kLanes * kLanes] = {};
      const int64_t width = min(columns - c, kLanes);
      for (int64_t i = 0; i < min(rows - r, kLanes); ++i) {
        for (int64_t j = 0; j < width; ++j) part[i * kLanes + j] = from[(r + i) * from_stride + c + j];
      }
      transpose_block(part, kLanes, width, panel + c * kPanel, kPanel);
    }
  }
}

}  // namespace dsopt::DSOPT_VARIANT
