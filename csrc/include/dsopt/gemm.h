// Weight rows times many tokens. A block of weight rows is turned into a panel that stays in the second-level cache,
// widened once for all tokens; a tile of results stays in registers while the panel and the tile's tokens stream by.
// A result is one chain of multiply-adds in the order of the packed token, whatever the tile around it.
#pragma once

#include "dsopt/dots.h"
#include "dsopt/panels.h"

namespace dsopt::DSOPT_VARIANT {

// a tile of results: tokens and vectors of weight rows; 27 of 32 registers, or 12 of 16
constexpr int kGemmTokens = kLanes == 16 ? 9 : 6;
constexpr int kGemmVecs = kLanes == 16 ? 3 : 2;
// weight rows of a panel, and elements of each that are in it at once
constexpr int kGemmRows = kGemmVecs * kLanes;
constexpr int64_t kGemmDepth = 2048;
static_assert(kGemmDepth % kStep == 0);
// Tokens from which turning the weights pays, and those of one call. Fewer are left to dot_rows: the answers to a few
// new tokens of a batch of 16 are then computed as those of one.
constexpr int64_t kGemmLeast = 65;
constexpr int64_t kGemmMost = 512;
// floats of a panel, and of what a tile fetches ahead behind it
constexpr int64_t kGemmAhead = 12 * kGemmRows;
constexpr int64_t kGemmPanel = kGemmRows * kGemmDepth + kGemmAhead;
// elements of a weight row from those that are turned to those that are fetched
constexpr int64_t kTurnAhead = 4 * kStep;

// how many of `left` tokens are taken by one call of at most `most`: parts of nearly one size
DSOPT_INLINE int64_t part(int64_t left, int64_t most) { return (left - 1) / ((left + most - 1) / most) + 1; }

// Multiply-adds of four bytes of a weight row with four bytes of a token, a pair of Bf16 where Packing has those.
template <class T>
struct Lane {
  static constexpr int kElements = 4 / sizeof(typename Packing<T>::Element);
  static DSOPT_INLINE Vec step(Vec x, Vec w, Vec acc) {
#if defined(__AVX512BF16__)
    if constexpr (kElements == 2) return _mm512_dpbf16_ps(acc, (__m512bh)x, (__m512bh)w);
#endif
    return madd(x, w, acc);
  }
};

// out[t][:] = (more ? out[t][:] : 0) + sum_k x[t][k] * panel[k][:] over VECS vectors and `depth` times four bytes
template <int TOKENS, int VECS, class T>
void gemm_tile(const float* const* x, int64_t first, const float* panel, int64_t depth, bool more, float* out,
               int64_t out_stride) {
  Vec acc[TOKENS][VECS];
  const float* token[TOKENS];
  DSOPT_UNROLL
  for (int t = 0; t < TOKENS; ++t) {
    token[t] = x[t] + first;
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) acc[t][j] = more ? load(out + t * out_stride + j * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k, panel += kGemmRows) {
    Vec w[VECS];
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) {
      w[j] = load(panel + j * kLanes);
      if (j * kLanes % 16 == 0) __builtin_prefetch(panel + kGemmAhead + j * kLanes);
    }
    DSOPT_UNROLL
    for (int t = 0; t < TOKENS; ++t) {
      const Vec v = splat(token[t][k]);
      DSOPT_UNROLL
      for (int j = 0; j < VECS; ++j) acc[t][j] = Lane<T>::step(v, w[j], acc[t][j]);
    }
  }
  DSOPT_UNROLL
  for (int t = 0; t < TOKENS; ++t) {
    DSOPT_UNROLL
    for (int j = 0; j < VECS; ++j) store(out + t * out_stride + j * kLanes, acc[t][j]);
  }
}

// m[i][j] <-> m[j][i]
DSOPT_INLINE void transpose(Vec (&m)[kLanes]) {
  Vec other[kLanes];
  DSOPT_UNROLL
  for (int n = 1; n < kLanes; n *= 2) {
    DSOPT_UNROLL
    for (int r = 0; r < kLanes / 2; ++r) {
      other[2 * r] = riffle_low(m[r], m[r + kLanes / 2]);
      other[2 * r + 1] = riffle_high(m[r], m[r + kLanes / 2]);
    }
    DSOPT_UNROLL
    for (int r = 0; r < kLanes; ++r) m[r] = other[r];
  }
}

// kLanes rows of kStep elements as columns of a panel, in the order in which tokens are packed
template <class T>
DSOPT_INLINE void turn_step(const T* w, int64_t stride, float* panel) {
  using P = Packing<T>;
  constexpr int parts = 2 / Lane<T>::kElements;
  if constexpr (sizeof(T) == 2 && parts == 2 && P::place(1) != 1) {
    // neighbours are turned as one and parted afterwards
    Vec m[kLanes];
    DSOPT_UNROLL
    for (int r = 0; r < kLanes; ++r) __builtin_memcpy(&m[r], w + r * stride, sizeof m[r]);
    transpose(m);
    DSOPT_UNROLL
    for (int k = 0; k < kLanes; ++k) {
      store(panel + k * kGemmRows, (Vec)((VecU)m[k] << 16));
      store(panel + (kLanes + k) * kGemmRows, (Vec)((VecU)m[k] & 0xffff0000u));
    }
  } else {
    for (int part = 0; part < parts; ++part) {
      Vec m[kLanes];
      DSOPT_UNROLL
      for (int r = 0; r < kLanes; ++r) {
        const auto v = P::weights(w + r * stride, part);
        __builtin_memcpy(&m[r], &v, sizeof m[r]);
      }
      transpose(m);
      DSOPT_UNROLL
      for (int k = 0; k < kLanes; ++k) store(panel + (part * kLanes + k) * kGemmRows, m[k]);
    }
  }
}

// elements first .. last of weight rows as a panel, zeros for rows from `rows` up to whole vectors and for
// elements up to whole steps
template <class T>
void turn_rows(Rows<T> w, int64_t rows, int64_t first, int64_t last, float* panel) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t some = min(rows - r, kLanes);
    float* to = panel + r;
    for (int64_t k = first; k < last; k += kStep, to += kStep / Lane<T>::kElements * kGemmRows) {
      const T* from = w.data + r * w.stride + k;
      if (some == kLanes && k + kStep <= last) {
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(from + i * w.stride + kTurnAhead);
        turn_step(from, w.stride, to);
        continue;
      }
      T part[kLanes * kStep] = {};
      for (int64_t i = 0; i < some; ++i) {
        for (int64_t j = 0; j < min(kStep, last - k); ++j) part[i * kStep + j] = from[i * w.stride + j];
      }
      turn_step(part, kStep, to);
    }
  }
}

template <int VECS, class T>
void gemm_tokens(int64_t tokens, const float* const* x, int64_t first, const float* panel, int64_t depth, bool more,
                 float* out, int64_t out_stride) {
  const auto run = [&](auto tile) __attribute__((always_inline)) {
    tile(x, first, panel, depth, more, out, out_stride);
  };
  switch (kGemmTokens - tokens) {
    case 0: return run(gemm_tile<kGemmTokens, VECS, T>);
    case 1: return run(gemm_tile<kGemmTokens - 1, VECS, T>);
    case 2: return run(gemm_tile<kGemmTokens - 2, VECS, T>);
    case 3: return run(gemm_tile<kGemmTokens - 3, VECS, T>);
  }
}

// out[t * out_stride + r] = <w[r], x[t]> for rows <= kGemmRows and many tokens, 20 at least
// w[r] are k long, x[t] packed; turn(first, last) makes `panel`, memory of kGemmPanel, of elements first .. last of
// the rows; rows of `out` have room for whole vectors
template <class T, class Turn>
void gemm_rows(const Turn& turn, int64_t rows, const typename Packing<T>::Element* const* x, int64_t tokens, int64_t k,
               const float* panel, float* out, int64_t out_stride) {
  const float* const* packed = reinterpret_cast<const float* const*>(x);
  const auto multiply = rows > kLanes ? gemm_tokens<kGemmVecs, T> : gemm_tokens<1, T>;
  const int64_t tiles = (tokens + kGemmTokens - 1) / kGemmTokens;
  for (int64_t at = 0; at == 0 || at < k; at += kGemmDepth) {
    const int64_t last = min(k, at + kGemmDepth);
    turn(at, last);
    const int64_t first = at / Lane<T>::kElements, depth = round_up(last - at, kStep) / Lane<T>::kElements;
    // tiles of nearly one size: none is so small that its chains of sums are waited for
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t t = tokens * i / tiles, end = tokens * (i + 1) / tiles;
      multiply(end - t, packed + t, first, panel, depth, at > 0, out + t * out_stride, out_stride);
    }
  }
}

}  // namespace dsopt::DSOPT_VARIANT
