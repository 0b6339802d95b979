// Attention of a tile of a few queries over a block of packed keys and values, part after part of a softmax.
#pragma once

#include "dsopt/masks.h"
#include "dsopt/panels.h"

namespace dsopt::DSOPT_VARIANT {

constexpr int64_t kMaskChunk = 64;
constexpr int64_t kBlock = 256;
constexpr int64_t kBlockChunks = kBlock / kMaskChunk;
static_assert(kMaskChunk % kPanel == 0 && kBlock == kSlice, "a chunk is whole panels, a block's weights one slice");

using BlockMasks = QueryMasks<kMaskChunk>;

// A set of a block's chunks, one bit each, by its stretches of neighbours
using Chunks = uint32_t;

template <class F>
void for_each_stretch(Chunks chunks, F&& f) {
  for (int64_t c = 0; c < kBlockChunks; ++c) {
    if (!(chunks >> c & 1)) continue;
    const int64_t first = c;
    while (c < kBlockChunks && chunks >> c & 1) ++c;
    f(first, c);
  }
}

// the block's chunks that a query sees
inline Chunks seen_chunks(const BlockMasks& masks, int64_t query, int64_t block) {
  Chunks chunks = 0;
  const int64_t start = block * kBlockChunks, end = min(masks.chunks() - start, kBlockChunks);
  for (int64_t c = 0; c < end; ++c) chunks |= Chunks{masks.sees(query, start + c)} << c;
  return chunks;
}

// elements k .. k + n of row r of a left operand become from * factor
template <class T>
void widen(const T* from, int64_t n, float factor, float* tile, int64_t r, int64_t k) {
  for (int64_t i = 0; i < n;) {
    const int64_t end = min(n, i + kSlice - (k + i) % kSlice);
    float* to = tile + tile_at(r, k + i) - i;
    for (; i + kLanes <= end; i += kLanes) store(to + i, load(from + i) * factor);
    for (; i < end; ++i) to[i] = to_float(from[i]) * factor;
  }
}

template <class E>
void fetch(const E* p, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(E)) __builtin_prefetch(p + i);
}

// adds the mask to a query's scores of some chunks of a block; returns the largest, or `largest`
inline float add_mask(const BlockMasks& masks, int64_t query, int64_t block, Chunks chunks, float* scores,
                      float largest) {
  float bias[kMaskChunk];
  Vec best = splat(largest);
  for_each_stretch(chunks, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) {
      float* score = scores + c * kMaskChunk;
      if (masks.chunk_of(query, block * kBlockChunks + c) == kPlain) {
        for (int64_t i = 0; i < kMaskChunk; i += kLanes) best = max(load(score + i), best);
        continue;
      }
      masks.make_bias(query, block * kBlock + c * kMaskChunk, bias);
      for (int64_t i = 0; i < kMaskChunk; i += kLanes) {
        // a hidden key's score may be anything, behind the last key even memory that was never written
        const Vec add = load(bias + i);
        const Vec v = add == -kInfinity ? add : load(score + i) + add;
        store(score + i, v);
        best = max(v, best);
      }
    }
  });
  return max(best);
}

// scores of some chunks become weights relative to the largest score; returns their sum
inline float soften_chunks(Chunks chunks, float* scores, float largest) {
  // nothing visible so far: all scores are -infinity, and so will be their differences to anything finite
  const float from = largest == -kInfinity ? 0.0f : largest;
  Vec sums = {};
  for_each_stretch(chunks, [&](int64_t first, int64_t last) {
    for (int64_t i = first * kMaskChunk; i < last * kMaskChunk; i += kLanes) {
      const Vec v = exp_nonpositive(load(scores + i) - from);
      sums += v;
      store(scores + i, v);
    }
  });
  return sum(sums);
}

struct Block {
  const float* keys;    // panels of depth rows, kBlock columns
  const float* values;  // panels of kBlock rows, value_pad columns
  int64_t index, depth, value_pad;
};

// Takes rows <= kTileRows queries, whose scaled operand is `tile`, by the chunks of a block that one of them sees.
// scores: memory of kTileRows x kTileStride; maximum, total, sum: those of the first row, sums value_pad apart.
// fetch_next(r) fetches what the next tile's row r is made of.
template <class F>
void attend_block(const BlockMasks& masks, const int64_t* queries, int64_t rows, const Block& block, Chunks chunks,
                  const float* tile, float* scores, float* maximum, float* total, float* sum, F&& fetch_next) {
  int64_t end = 0;
  for (int64_t r = 0; r < rows; ++r) end = max(masks.end_of(queries[r]), end);
  const int64_t size = min(kBlock, end - block.index * kBlock);
  for_each_stretch(chunks, [&](int64_t first, int64_t last) {
    const int64_t stop = min(last * kMaskChunk, size);
    for (int64_t t = first * kMaskChunk; t < stop; t += kPanel) {
      panel_product(rows, tile, block.keys + t * block.depth, block.depth, stop - t, scores + t, kTileStride);
    }
  });
  float largest[kTileRows], keep[kTileRows];
  for (int64_t r = 0; r < rows; ++r) {
    fetch(sum + r * block.value_pad, block.value_pad);
    largest[r] = add_mask(masks, queries[r], block.index, chunks, scores + r * kTileStride, maximum[r]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float added = soften_chunks(chunks, scores + r * kTileStride, largest[r]);
    keep[r] = largest[r] == -kInfinity ? 1.0f : exp_nonpositive(splat(maximum[r] - largest[r]))[0];
    total[r] = total[r] * keep[r] + added;
    maximum[r] = largest[r];
    fetch_next(r);
  }
  for_each_stretch(chunks, [&](int64_t first, int64_t last) {
    const int64_t t = first * kMaskChunk, n = min(last * kMaskChunk, size) - t;
    for (int64_t c = 0; c < block.value_pad; c += kPanel) {
      panel_sum(rows, scores + t, block.values + c * kBlock + t * kPanel, n, keep, sum + c, block.value_pad);
    }
    for (int64_t r = 0; r < rows; ++r) keep[r] = 1.0f;
  });
}

}  // namespace dsopt::DSOPT_VARIANT
