// Rows of a weight matrix of any dtype times packed tokens.
//
// Beside few tokens weights in FP8 stay unscaled: the tokens are multiplied by the scales instead, once for all rows of
// a block. Beside many the weights are scaled where they are turned into panels.
#pragma once

#include "dsopt/gemm.h"
#include "dsopt/scales.h"

namespace dsopt::DSOPT_VARIANT {

// rows of a matrix from the `first` one on, and the scales of all of it
template <class W>
struct Matrix {
  Rows<W> rows;
  Scales scales;
  int64_t first;

  DSOPT_INLINE Matrix from(int64_t r) const { return {rows.from(r), scales, first + r}; }
};

// matrix `index` of a stack
template <class W>
DSOPT_INLINE Matrix<W> matrix(const Tensor3& w, const Scales& scales, int64_t index) {
  return {{static_cast<const W*>(w.data) + index * w.stride0, w.stride1}, scales_of(scales, index), 0};
}

// how many of `rows` rows from `first` on have one row of scales
DSOPT_INLINE int64_t rows_of_block(const Scales& s, int64_t first, int64_t rows) {
  return min(rows, s.rows - first % s.rows);
}

// out[i] = x[i] * the scale of column i in a row of scales; packed both, k columns
inline void scale_packed(const float* x, const Scales& s, int64_t row, int64_t k, float* out) {
  if (s.columns % kStep == 0) {
    for (int64_t i = 0, column = 0; i < packed_width(k); ++column) {
      const Vec scale = splat(scale_at(s, row, column));
      const int64_t end = min(packed_width(k), i + s.columns);
      for (; i < end; i += kLanes) store(out + i, load(x + i) * scale);
    }
    return;
  }
  for (int64_t i = 0; i < packed_width(k); ++i) out[i] = 0.0f;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t at = Packing<Fp8>::place(i);
    out[at] = x[at] * scale_at(s, row, i / s.columns);
  }
}

// bytes from the weights in use to those that are fetched
constexpr int64_t kFp8Ahead = 512;

// out[t * out_stride + r * step] = <w[r * step], x[t]> for r < ROWS, t < TOKENS; x packed
template <int ROWS, int TOKENS>
DSOPT_INLINE void dot_fp8(Rows<Fp8> w, const float* const* x, int64_t k, float* out, int64_t out_stride, int64_t step) {
  Vec acc[TOKENS][ROWS];
  const Fp8* row[ROWS];
  const float* token[TOKENS];
  DSOPT_UNROLL
  for (int t = 0; t < TOKENS; ++t) {
    token[t] = x[t];
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) acc[t][r] = Vec{};
  }
  DSOPT_UNROLL
  for (int r = 0; r < ROWS; ++r) row[r] = w.data + r * step * w.stride;
  int64_t at = 0;
  for (; at + kFp8Step <= k; at += kFp8Step) {
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      Vec v[4];
      widen(row[r], v);
      __builtin_prefetch(row[r] + kFp8Ahead);
      row[r] += kFp8Step;
      DSOPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) {
        DSOPT_UNROLL
        for (int i = 0; i < 4; ++i) acc[t][r] = madd(v[i], load(token[t] + at + i * kLanes), acc[t][r]);
      }
    }
  }
  if (at < k) {
    const int parts = static_cast<int>((packed_width(k) - at) / kLanes);
    for (int r = 0; r < ROWS; ++r) {
      Fp8 rest[kFp8Step] = {};
      for (int64_t i = at; i < k; ++i) rest[i - at] = row[r][i - at];
      Vec v[4];
      widen(rest, v);
      for (int t = 0; t < TOKENS; ++t) {
        for (int i = 0; i < parts; ++i) acc[t][r] = madd(v[i], load(token[t] + at + i * kLanes), acc[t][r]);
      }
    }
  }
  DSOPT_UNROLL
  for (int t = 0; t < TOKENS; ++t) store_sums<ROWS>(acc[t], out + t * out_stride, step);
}

// dot_fp8 of any number of rows that share their scales
template <int TOKENS>
void fp8_rows(Rows<Fp8> w, int64_t rows, const float* const* x, int64_t k, float* out, int64_t out_stride) {
  // as many results as leave room for tables of codes in registers
  constexpr int tile = TOKENS == 1 && kLanes == 16 ? kRowsOfOne : TOKENS <= 4 ? 4 : 2;
  const int64_t tiles = rows / tile;
  // rows of a tile lie apart, so that each goes on into the next tile's: long streams, which the processor foresees
  for (int64_t i = 0; i < tiles; ++i) dot_fp8<tile, TOKENS>(w.from(i), x, k, out + i, out_stride, tiles);
  for (int64_t r = tiles * tile; r < rows; ++r) dot_fp8<1, TOKENS>(w.from(r), x, k, out + r, out_stride, 1);
}

// floats of memory that few_tokens needs beside weights of k columns
template <class W>
constexpr int64_t few_tokens_memory(int64_t k) {
  return sizeof(W) == 1 ? kTileTokens * token_stride<float>(k) : 0;
}

// out[t * out_stride + r] = <w[r], x[t]> for rows <= kMaxRows and tokens <= kTileTokens; x packed
template <class W>
void few_tokens(const Matrix<W>& w, int64_t rows, const typename Packing<W>::Element* const* x, int64_t tokens,
                int64_t k, float* memory, float* out, int64_t out_stride) {
  if constexpr (sizeof(W) != 1) {
    dot_rows(w.rows, rows, x, tokens, k, out, out_stride);
  } else {
    static_assert(kTileTokens == (kLanes == 16 ? 6 : 2), "one case each");
    const float* scaled[kTileTokens];
    for (int64_t t = 0; t < tokens; ++t) scaled[t] = memory + t * token_stride<float>(k);
    for (int64_t r = 0, n; r < rows; r += n) {
      n = rows_of_block(w.scales, w.first + r, rows - r);
      for (int64_t t = 0; t < tokens; ++t) {
        scale_packed(x[t], w.scales, (w.first + r) / w.scales.rows, k, memory + t * token_stride<float>(k));
      }
      const auto run = [&](auto product) { product(w.rows.from(r), n, scaled, k, out + r, out_stride); };
      switch (tokens) {
        case 1: run(fp8_rows<1>); break;
        case 2: run(fp8_rows<2>); break;
#if defined(__AVX512F__)
        case 3: run(fp8_rows<3>); break;
        case 4: run(fp8_rows<4>); break;
        case 5: run(fp8_rows<5>); break;
        case 6: run(fp8_rows<6>); break;
#endif
      }
    }
  }
}

#if defined(__AVX512F__)
// kFp8Step elements of kLanes weight rows, scaled, as columns of a panel
inline void turn_fp8(const Fp8* w, int64_t stride, Vec scale, float* panel) {
  // four neighbours are turned as one and parted afterwards
  Vec m[kLanes];
  DSOPT_UNROLL
  for (int r = 0; r < kLanes; ++r) __builtin_memcpy(&m[r], w + r * stride, sizeof m[r]);
  transpose(m);
  DSOPT_UNROLL
  for (int k = 0; k < kLanes; ++k) {
    Vec v[4];
    widen_fours((__m512i)m[k], v);
    DSOPT_UNROLL
    for (int i = 0; i < 4; ++i) store(panel + Packing<Fp8>::place(4 * k + i) * kGemmRows, v[i] * scale);
  }
}
#endif

// kFp8Step elements from k on of `rows` weight rows, scaled, as columns of a panel; none from `last` on
inline void turn_fp8(const Matrix<Fp8>& w, int64_t rows, int64_t k, int64_t last, float* panel) {
  float block[kLanes][kFp8Step];
  const Scales& s = w.scales;
  const bool one = s.columns % kFp8Step == 0;  // scale for all of a row's elements
  const int64_t column = k / s.columns;
  int64_t row = w.first / s.rows, left = s.rows - w.first % s.rows;
#if defined(__AVX512F__)
  if (one && rows == kLanes && left >= kLanes && k + kFp8Step <= last) {
    const Fp8* from = w.rows.data + k;
    for (int i = 0; i < kLanes; ++i) __builtin_prefetch(from + i * w.rows.stride + 4 * kFp8Step);
    return turn_fp8(from, w.rows.stride, splat(scale_at(s, row, column)), panel);
  }
#endif
  for (int64_t i = 0; i < kLanes; ++i) {
    Vec v[4] = {};
    Fp8 rest[kFp8Step] = {};
    const Fp8* from = w.rows.data + i * w.rows.stride + k;
    if (i >= rows) {
      from = rest;
    } else if (k + kFp8Step > last) {
      for (int64_t j = 0; j < last - k; ++j) rest[j] = from[j];
      from = rest;
    } else {
      __builtin_prefetch(from + 4 * kFp8Step);
    }
    widen(from, v);
    const Vec scale = splat(one && i < rows ? scale_at(s, row, column) : 1.0f);
    DSOPT_UNROLL
    for (int part = 0; part < 4; ++part) store(block[i] + part * kLanes, v[part] * scale);
    if (!one && i < rows) {
      for (int64_t j = 0; j < min(kFp8Step, last - k); ++j) {
        block[i][Packing<Fp8>::place(j)] *= scale_at(s, row, (k + j) / s.columns);
      }
    }
    if (--left == 0) ++row, left = s.rows;
  }
  for (int part = 0; part < 4 && k + part / 2 * kStep < last; ++part) {
    Vec m[kLanes];
    DSOPT_UNROLL
    for (int i = 0; i < kLanes; ++i) m[i] = load(block[i] + part * kLanes);
    transpose(m);
    DSOPT_UNROLL
    for (int i = 0; i < kLanes; ++i) store(panel + (part * kLanes + i) * kGemmRows, m[i]);
  }
}

// out[t * out_stride + r] = <w[r], x[t]> as gemm_rows has it
template <class W>
void many_tokens(const Matrix<W>& w, int64_t rows, const typename Packing<W>::Element* const* x, int64_t tokens,
                 int64_t k, float* panel, float* out, int64_t out_stride) {
  const auto turn = [&](int64_t first, int64_t last) {
    if constexpr (sizeof(W) != 1) {
      turn_rows(w.rows, rows, first, last, panel);
    } else {
      for (int64_t r = 0; r < rows; r += kLanes) {
        for (int64_t at = first; at < last; at += kFp8Step) {
          turn_fp8(w.from(r), min(kLanes, rows - r), at, last, panel + r + (at - first) * kGemmRows);
        }
      }
    }
  };
  gemm_rows<W>(turn, rows, x, tokens, k, panel, out, out_stride);
}

}  // namespace dsopt::DSOPT_VARIANT
