// Dot products of weight rows with few or many tokens: the body of every linear layer.
//
// A weight row is read in its stored layout, kStep elements at once, and meets tokens that were packed before
// into the order in which its elements come out of the load. A result is one chain of multiply-adds per vector
// lane and one tree over the lanes, whatever the tile around it: it does not depend on how many rows and tokens
// are computed with it.
#pragma once

#include "dsopt/fp8.h"

namespace dsopt::DSOPT_VARIANT {

// weight elements read at once; a packed token is zero up to a multiple of it
constexpr int kStep = 2 * kLanes;
// weight rows of a tile beside one token and beside several, and tokens of it
constexpr int kRowsOfOne = 8;
constexpr int kRowsOfMany = 4;
constexpr int kTileTokens = kLanes == 16 ? 6 : 2;

// How a token is packed for weights of dtype T, and one step of the dot product.
template <class T>
struct Packing {
  using Element = float;
  static constexpr int kParts = 2;
  static constexpr int64_t place(int64_t i) { return i; }
  static DSOPT_INLINE Vec weights(const T* w, int part) { return load(w + part * kLanes); }
  static DSOPT_INLINE Vec step(Vec w, const float* x, Vec acc) { return madd(w, load(x), acc); }
};

#if defined(__AVX512BF16__)
template <>
struct Packing<Bf16> {
  using Element = Bf16;
  static constexpr int kParts = 1;
  static constexpr int64_t place(int64_t i) { return i; }
  static DSOPT_INLINE __m512bh weights(const Bf16* w, int) {
    __m512bh v;
    __builtin_memcpy(&v, w, sizeof v);
    return v;
  }
  static DSOPT_INLINE Vec step(__m512bh w, const Bf16* x, Vec acc) { return _mm512_dpbf16_ps(acc, w, weights(x, 0)); }
};
#else
// The even elements of 2 * kLanes are widened by a shift, the odd ones by a mask: one instruction each, where
// widening neighbours takes two. So a packed token has the even elements of each step before the odd ones.
template <>
struct Packing<Bf16> {
  using Element = float;
  static constexpr int kParts = 2;
  static constexpr int64_t place(int64_t i) { return i / kStep * kStep + i % 2 * kLanes + i % kStep / 2; }
  static DSOPT_INLINE Vec weights(const Bf16* w, int part) {
    VecU v;
    __builtin_memcpy(&v, w, sizeof v);
    return part == 0 ? (Vec)(v << 16) : (Vec)(v & 0xffff0000u);
  }
  static DSOPT_INLINE Vec step(Vec w, const float* x, Vec acc) { return madd(w, load(x), acc); }
};
#endif

// Weights in FP8 are widened as those in bfloat16 are, and meet tokens packed in the same order.
template <>
struct Packing<Fp8> {
  using Element = float;
  static constexpr int64_t place(int64_t i) { return i / kStep * kStep + i % 2 * kLanes + i % kStep / 2; }
};

// Elements of a packed token of width k.
constexpr int64_t packed_width(int64_t k) { return (k + kStep - 1) / kStep * kStep; }

// Elements from one packed token of width k to the next: an odd number of cache lines, so that the tokens of a tile do
// not meet in the same sets of the first-level cache.
template <class T>
constexpr int64_t token_stride(int64_t k) {
  constexpr int64_t line = 64 / sizeof(typename Packing<T>::Element);
  return ((packed_width(k) + line - 1) / line | 1) * line;
}

// x (k elements of dtype T) as a packed token of packed_width(k) elements, for weights of dtype W
template <class T, class W = T>
void pack(const T* x, int64_t k, typename Packing<W>::Element* out) {
  using Element = typename Packing<W>::Element;
  int64_t i = 0;
  if constexpr (sizeof(W) == sizeof(Element)) {
    for (; i < k; ++i) out[i] = x[i];
    for (; i < packed_width(k); ++i) store(out + i, 0.0f);
  } else {
    for (; i + kStep <= k; i += kStep) {
      if constexpr (sizeof(T) == sizeof(W)) {
        store(out + i, Packing<T>::weights(x + i, 0));
        store(out + i + kLanes, Packing<T>::weights(x + i, 1));
      } else {
        const Vec a = load(x + i), b = load(x + i + kLanes);
        for (int part = 0; part < 2; ++part) store(out + i + part * kLanes, part == 0 ? evens(a, b) : odds(a, b));
      }
    }
    for (int64_t j = i; j < packed_width(k); ++j) out[j] = 0.0f;
    for (; i < k; ++i) out[Packing<W>::place(i)] = to_float(x[i]);
  }
}

// A stack of weight rows: row r at data + r * stride.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  DSOPT_INLINE Rows from(int64_t r) const { return {data + r * stride, stride}; }
};

// Which rows of a block are taken together, as streams through memory: `step` rows apart, while `ahead` elements
// further on lies what each stream needs next.
struct Streams {
  int64_t step, ahead;
};

// Rows much shorter than a page are too short for the processor's own prefetching, which starts anew with each: streams
// that go on into the next row are as long as several.
template <class T>
DSOPT_INLINE Streams streams(Rows<T> w, int64_t tiles, int tile, int64_t k) {
  const bool is_short = tiles > 1 && k * static_cast<int64_t>(sizeof(T)) <= 3072;
  return is_short ? Streams{tiles, w.stride} : Streams{1, tile * w.stride};
}

// out[r * step] = sum of acc[r]; the same tree over the lanes for any number of rows
template <int ROWS>
DSOPT_INLINE void store_sums(const Vec (&acc)[ROWS], float* out, int64_t step) {
  if constexpr (ROWS % 4 == 0) {
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; r += 4) {
      Vec four = add_pairs(add_pairs(acc[r], acc[r + 1]), add_pairs(acc[r + 2], acc[r + 3]));
      for (int n = kLanes; n > 4; n /= 2) four = add_pairs(four, four);
      float part[4];
      __builtin_memcpy(part, &four, sizeof part);
      for (int i = 0; i < 4; ++i) out[(r + i) * step] = part[i];
    }
  } else {
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) out[r * step] = sum(acc[r]);
  }
}

// out[t * out_stride + r * by.step] = <w[r * by.step], x[t]> for r < ROWS, t < TOKENS; w[r] are k long, x[t] packed.
// Only elements first .. last are taken; the sums so far come from and go to `sums` unless they are the first
// and the last ones.
template <int ROWS, int TOKENS, class T>
DSOPT_INLINE void dot_block(Rows<T> w, const typename Packing<T>::Element* const* x, int64_t first, int64_t last,
                            int64_t k, Vec* sums, float* out, int64_t out_stride, Streams by) {
  using P = Packing<T>;
  Vec acc[ROWS][TOKENS];
  if (first == 0) {
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      DSOPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) acc[r][t] = Vec{};
    }
  } else {
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      DSOPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) acc[r][t] = sums[r * TOKENS + t];
    }
  }
  const T* row[ROWS];
  const typename P::Element* token[TOKENS];
  DSOPT_UNROLL
  for (int r = 0; r < ROWS; ++r) row[r] = w.data + r * by.step * w.stride + first;
  DSOPT_UNROLL
  for (int t = 0; t < TOKENS; ++t) token[t] = x[t];

  // from: where each row's next kStep weights lie
  const auto step = [&](const T* const* from, int64_t at) __attribute__((always_inline)) {
    DSOPT_UNROLL
    for (int part = 0; part < P::kParts; ++part) {
      decltype(P::weights(from[0], part)) weights[ROWS];
      DSOPT_UNROLL
      for (int r = 0; r < ROWS; ++r) weights[r] = P::weights(from[r], part);
      DSOPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) {
        DSOPT_UNROLL
        for (int r = 0; r < ROWS; ++r) acc[r][t] = P::step(weights[r], token[t] + at + part * kLanes, acc[r][t]);
      }
    }
  };
  int64_t at = first;
  for (; at + kStep <= last; at += kStep) {
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t line = 0; line < kStep; line += 64 / sizeof(T)) {
        __builtin_prefetch(row[r] + by.ahead + line);
      }
    }
    step(row, at);
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) row[r] += kStep;
  }
  if (last < k) {
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      DSOPT_UNROLL
      for (int t = 0; t < TOKENS; ++t) sums[r * TOKENS + t] = acc[r][t];
    }
    return;
  }
  if (at < k) {
    T part[ROWS][kStep] = {};
    const T* rest[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      for (int64_t i = at; i < k; ++i) part[r][i - at] = row[r][i - at];
      rest[r] = part[r];
    }
    step(rest, at);
  }

  DSOPT_UNROLL
  for (int t = 0; t < TOKENS; ++t) {
    Vec sums_of[ROWS];
    DSOPT_UNROLL
    for (int r = 0; r < ROWS; ++r) sums_of[r] = acc[r][t];
    store_sums<ROWS>(sums_of, out + t * out_stride, by.step);
  }
}

// rows of one call, and the elements of a token that are taken at once, so that a tile's tokens stay in the
// first-level cache while the rows go by
constexpr int64_t kMaxRows = 64;
constexpr int64_t kDepth = 1024;

template <int TOKENS, class T>
void dot_tile_rows(Rows<T> w, int64_t rows, const typename Packing<T>::Element* const* x, int64_t k, float* out,
                   int64_t out_stride) {
  constexpr int size = kRowsOfMany * TOKENS;
  Vec sums[kMaxRows / kRowsOfMany * size];
  const int64_t tiles = rows / kRowsOfMany;
  const Streams by = streams(w, tiles, kRowsOfMany, k);
  const int64_t next = by.step == 1 ? kRowsOfMany : 1;
  for (int64_t first = 0; first == 0 || first < k; first += kDepth) {
    const int64_t last = min(k, first + kDepth);
    for (int64_t i = 0; i < tiles; ++i) {
      dot_block<kRowsOfMany, TOKENS>(w.from(i * next), x, first, last, k, sums + i * size, out + i * next, out_stride, by);
    }
  }
}

// out[t * out_stride + r] = <w[r], x[t]> for rows <= kMaxRows and tokens <= kTileTokens
template <class T>
void dot_rows(Rows<T> w, int64_t rows, const typename Packing<T>::Element* const* x, int64_t tokens, int64_t k,
              float* out, int64_t out_stride) {
  static_assert(kTileTokens == (kLanes == 16 ? 6 : 2), "one case each");
  switch (tokens) {
    case 1: {
      const int64_t tiles = rows / kRowsOfOne;
      const Streams by = streams(w, tiles, kRowsOfOne, k);
      const int64_t next = by.step == 1 ? kRowsOfOne : 1;
      for (int64_t i = 0; i < tiles; ++i) {
        dot_block<kRowsOfOne, 1>(w.from(i * next), x, 0, k, k, nullptr, out + i * next, out_stride, by);
      }
      break;
    }
    case 2: dot_tile_rows<2>(w, rows, x, k, out, out_stride); break;
#if defined(__AVX512F__)
    case 3: dot_tile_rows<3>(w, rows, x, k, out, out_stride); break;
    case 4: dot_tile_rows<4>(w, rows, x, k, out, out_stride); break;
    case 5: dot_tile_rows<5>(w, rows, x, k, out, out_stride); break;
    case 6: dot_tile_rows<6>(w, rows, x, k, out, out_stride); break;
#endif
  }
  const int64_t tile = tokens == 1 ? kRowsOfOne : kRowsOfMany;
  for (int64_t r = rows / tile * tile; r < rows; ++r) {
    for (int64_t t = 0; t < tokens; ++t) {
      dot_block<1, 1>(w.from(r), x + t, 0, k, k, nullptr, out + t * out_stride + r, out_stride, {1, w.stride});
    }
  }
}

}  // namespace dsopt::DSOPT_VARIANT
