// Latent attention for few new tokens, in the absorbed form: the cache is read as it is.
//
//   query[h]  = scale * cat(q_nope[h] @ w_uk[h], q_rope[h])
//   score[t]  = <query[h], cat(latent[t], k_rope[t])> + mask[t]
//   out[h]    = w_uv[h] @ (sum_t softmax(score)[t] latent[t])
//
// Keys are taken in splits of kSplit, and these in chunks of kChunk that are widened to float32 once for a
// group of rows (a row is one head of one new token) and used for scores and sums while in cache. Each
// split gives a partial (maximum, sum of weights, weighted sum of latents) per row; partials are merged in
// the order of the keys. What a row's answer is made of is fixed by its keys alone, so it does not depend
// on the number of threads, on the batch, or on how long the buffer behind the visible keys is.
#include "dsopt/kernels.h"
#include "dsopt/masks.h"
#include "dsopt/parallel.h"
#include "dsopt/simd.h"
#include "dsopt/softmax.h"
#include "dsopt/tiles.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kSplit = 512;
constexpr int64_t kGroup = 32;
constexpr int64_t kPad = 16;
constexpr int64_t kWeightRows = 8;

struct Layout {
  int64_t rows, groups, chunks, splits, slots;
  int64_t rank_pad, rope_pad, depth, stride;  // a widened key or query: latent, zeros, rope, zeros, unused
};

template <class T>
struct Attention {
  const MlaAttention& a;
  Layout l;
  int threads;

  float* queries;            // [batch][groups * kGroup][stride]
  float* partials;           // [batch][groups][slots][kGroup][2 + rank_pad]
  QueryMasks<kChunk> masks;  // of queries b * tokens + s
  float* private_memory;
  int64_t private_size;

  explicit Attention(const MlaAttention& args) : a(args) {
    l.rows = a.heads * a.tokens;
    l.groups = (l.rows + kGroup - 1) / kGroup;
    l.chunks = (a.cached + kChunk - 1) / kChunk;
    l.splits = (a.cached + kSplit - 1) / kSplit;
    l.rank_pad = round_up(a.rank, kPad);
    l.rope_pad = round_up(a.rope, kPad);
    l.depth = l.rank_pad + l.rope_pad;
    // an odd number of cache lines, so that a column of the block spreads over all sets of the cache
    l.stride = l.depth + (l.depth / kPad % 2 ? 0 : kPad);
    threads = team_size(a.batch * l.rows * (a.rank * (a.nope + a.value) + a.cached * (a.rank + l.depth)));
    // with enough rows for all threads each item takes all splits in turn, and only merged partials are kept
    l.slots = a.batch * l.groups >= 2 * threads ? 1 : l.splits;

    const int64_t queries_size = a.batch * l.groups * kGroup * l.stride;
    const int64_t partials_size = a.batch * l.groups * l.slots * kGroup * (2 + l.rank_pad);
    const Tensor4 mask{a.mask.data, a.mask.stride0, 0, a.mask.stride1};
    masks = {mask, a.mask_kind, a.hidden, a.causal, 1, a.tokens, a.cached};
    const int64_t flags_size = round_up(masks.flags_size(a.batch * a.tokens), 64) / 4;
    const int64_t value_pad = round_up(a.value, kPad);
    const int64_t block = kChunk * l.stride + kGroup * kChunk + kGroup * (2 + l.rank_pad) + kGroup + kChunk;
    const int64_t heads = kDotRows * (round_up(a.nope, kPad) + l.rank_pad + value_pad + 1);
    private_size = round_up(block > heads ? block : heads, kPad);
    const int64_t floats = queries_size + partials_size + flags_size + threads * private_size;
    queries = static_cast<float*>(scratch(static_cast<unsigned long>(floats) * sizeof(float)));
    partials = queries + queries_size;
    private_memory = partials + partials_size;
    masks.flags = reinterpret_cast<uint8_t*>(private_memory + threads * private_size);
    // rows that only fill up a tile: their results are not read, but should not be slow subnormals either
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t row = l.rows; row < round_up(l.rows, kSumRows); ++row) {
        for (int64_t i = 0; i < l.depth; ++i) query(b, row)[i] = 0.0f;
      }
    }
  }

  float* query(int64_t b, int64_t row) const { return queries + (b * l.groups * kGroup + row) * l.stride; }

  Partial partial(int64_t b, int64_t group, int64_t slot) const {
    return partial_at(partials + ((b * l.groups + group) * l.slots + slot) * kGroup * (2 + l.rank_pad));
  }

  Partial partial_at(float* p) const { return {p + kGroup * l.rank_pad, p + kGroup * (l.rank_pad + 1), p}; }

  int64_t rows_of(int64_t group) const { return min(kGroup, l.rows - group * kGroup); }

  // queries of one head: absorbs w_uk, scales, appends the rotary part and the zero padding
  void make_queries(int64_t head, float* memory) const {
    int64_t at = 0;
    const int64_t count = a.batch * a.tokens;
    for (; at + kDotRows <= count; at += kDotRows) make_query_tile<kDotRows>(head, at, memory);
    for (; at < count; ++at) make_query_tile<1>(head, at, memory);
  }

  template <int ROWS>
  void make_query_tile(int64_t head, int64_t first, float* nope) const {
    const int64_t nope_pad = round_up(a.nope, kPad);
    const float zero[4] = {}, one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    float* out[4];
    for (int i = 0; i < ROWS; ++i) {
      const int64_t b = (first + i) / a.tokens, s = (first + i) % a.tokens;
      const T* q = static_cast<const T*>(a.q_nope.data) + b * a.q_nope.stride0 + head * a.q_nope.stride1 +
                   s * a.q_nope.stride2;
      for (int64_t d = 0; d < a.nope; ++d) nope[i * nope_pad + d] = to_float(q[d]) * a.scale;
      const T* r = static_cast<const T*>(a.q_rope.data) + b * a.q_rope.stride0 + head * a.q_rope.stride1 +
                   s * a.q_rope.stride2;
      out[i] = query(b, s * a.heads + head);
      for (int64_t c = 0; c < l.depth; ++c) out[i][c] = 0.0f;
      for (int64_t d = 0; d < a.rope; ++d) out[i][l.rank_pad + d] = to_float(r[d]) * a.scale;
    }
    const T* w = static_cast<const T*>(a.w_uk.data) + head * a.w_uk.stride0;
    // a few rows of w at a time: reads memory in order, while the results stay in the first-level cache
    for (int64_t d = 0; d < a.nope; d += kWeightRows) {
      const T* rows = w + d * a.w_uk.stride1;
      sum_rows<ROWS, kSumVecs, true>(nope + d, nope_pad, min(kWeightRows, a.nope - d), rows, a.w_uk.stride1, a.rank,
                                     d == 0 ? zero : one, out, kWeightRows * a.w_uk.stride1);
    }
  }

  static void widen_row(const T* from, int64_t n, float* to, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load_some(from + i, n - i));
    for (i = round_up(n, kLanes); i < padded; i += kLanes) store(to + i, Vec{});
  }

  const T* latent(int64_t b, int64_t t) const {
    return static_cast<const T*>(a.latent.data) + b * a.latent.stride0 + t * a.latent.stride1;
  }

  const T* k_rope(int64_t b, int64_t t) const {
    return static_cast<const T*>(a.k_rope.data) + b * a.k_rope.stride0 + t * a.k_rope.stride1;
  }

  // keys first .. first + kDotKeys of n as float32 rows, zero rows from n on
  void widen(int64_t b, int64_t first, int64_t n, float* block) const {
    for (int64_t t = 0; t < kDotKeys; ++t, block += l.stride) {
      const bool real = first + t < n;
      widen_row(latent(b, first + t), real ? a.rank : 0, block, l.rank_pad);
      widen_row(k_rope(b, first + t), real ? a.rope : 0, block + l.rank_pad, l.rope_pad);
    }
  }

  void prefetch(int64_t b, int64_t first, int64_t n) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t t = first; t < min(first + n, a.cached); ++t) {
      for (int64_t i = 0; i < a.rank; i += line) __builtin_prefetch(latent(b, t) + i, 0, 2);
      for (int64_t i = 0; i < a.rope; i += line) __builtin_prefetch(k_rope(b, t) + i, 0, 2);
    }
  }

  bool any_visible(int64_t b, int64_t group, int64_t chunk) const {
    const int64_t last = (group * kGroup + rows_of(group) - 1) / a.heads;
    for (int64_t s = group * kGroup / a.heads; s <= last; ++s) {
      if (masks.sees(b * a.tokens + s, chunk)) return true;
    }
    return false;
  }

  void attend_chunk(int64_t b, int64_t group, int64_t chunk, int64_t next, Partial p, float* memory) const {
    float* block = memory;
    float* scores = block + kChunk * l.stride;
    float* keep = scores + kGroup * kChunk;
    float* bias = keep + kGroup;
    const int64_t rows = rows_of(group), padded = round_up(rows, kSumRows);
    const int64_t first = chunk * kChunk, n = min(kChunk, a.cached - first);
    const float* q = query(b, group * kGroup);

    for (int64_t t = 0; t < n; t += kDotKeys) {
      if (next >= 0) prefetch(b, next * kChunk + t, kDotKeys);
      float* k = block + t * l.stride;
      widen(b, first + t, a.cached, k);
      const float* keys[4] = {k, k + l.stride, k + 2 * l.stride, k + 3 * l.stride};
      for (int64_t r = 0; r < padded; r += kDotRows) {
        dot_tile<kDotRows>(q + r * l.stride, l.stride, keys, l.depth, scores + r * kChunk + t, kChunk);
      }
    }

    const bool masked = masks.any() || n < kChunk;
    int64_t token = -1;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t s = (group * kGroup + r) / a.heads;
      if (masked && s != token) masks.make_bias(b * a.tokens + (token = s), first, bias);
      keep[r] = soften<kChunk>(scores + r * kChunk, masked ? bias : nullptr, p.maximum + r, p.total + r);
    }
    for (int64_t r = rows; r < padded; ++r) keep[r] = 0.0f;

    for (int64_t c = 0; c < l.rank_pad; c += kSumVecs * kLanes) {
      const int64_t width = min(kSumVecs * kLanes, l.rank_pad - c);
      for (int64_t r = 0; r < padded; r += kSumRows) {
        float* o = p.sum + r * l.rank_pad + c;
        float* const out[4] = {o, o + l.rank_pad, o + 2 * l.rank_pad, o + 3 * l.rank_pad};
        sum_rows<kSumRows, kSumVecs>(scores + r * kChunk, kChunk, n, block + c, l.stride, width, keep + r, out);
      }
    }
  }

  void clear(Partial p) const {
    for (int64_t r = 0; r < kGroup; ++r) p.maximum[r] = -kInfinity, p.total[r] = 0.0f;
  }

  // fills p from the visible chunks of one split; p.sum is left as it was if there is none
  void attend_split(int64_t b, int64_t group, int64_t split, Partial p, float* memory) const {
    int64_t chunks[kSplit / kChunk + 1];
    int count = 0;
    const int64_t end = min(l.chunks, (split + 1) * (kSplit / kChunk));
    for (int64_t c = split * (kSplit / kChunk); c < end; ++c) {
      if (any_visible(b, group, c)) chunks[count++] = c;
    }
    chunks[count] = -1;
    clear(p);
    if (count == 0) return;
    for (int64_t i = 0; i < round_up(rows_of(group), kSumRows) * l.rank_pad; ++i) p.sum[i] = 0.0f;
    for (int i = 0; i < count; ++i) attend_chunk(b, group, chunks[i], chunks[i + 1], p, memory);
  }

  void attend_all(int64_t b, int64_t group, float* memory) const {
    const Partial merged = partial(b, group, 0);
    const int64_t used = kChunk * l.stride + kGroup * kChunk + kGroup + kChunk;
    const Partial one = partial_at(memory + used);
    clear(merged);
    for (int64_t split = 0; split < l.splits; ++split) {
      attend_split(b, group, split, one, memory);
      for (int64_t r = 0; r < rows_of(group); ++r) merge_row(merged, r, one, r, l.rank_pad);
    }
  }

  // answers of one head: merges the splits, divides, applies w_uv
  void answer(int64_t head, float* memory) const {
    int64_t at = 0;
    const int64_t count = a.batch * a.tokens;
    for (; at + kDotRows <= count; at += kDotRows) answer_tile<kDotRows>(head, at, memory);
    for (; at < count; ++at) answer_tile<1>(head, at, memory);
  }

  template <int ROWS>
  void answer_tile(int64_t head, int64_t first, float* memory) const {
    const int64_t value_pad = round_up(a.value, kPad);
    float* results = memory;
    float* sums = results + ROWS * value_pad;
    for (int i = 0; i < ROWS; ++i) {
      const int64_t b = (first + i) / a.tokens, s = (first + i) % a.tokens;
      const int64_t row = s * a.heads + head;
      float maximum = -kInfinity, total = 0.0f;
      const Partial p = {&maximum, &total, sums + i * l.rank_pad};
      for (int64_t j = 0; j < l.slots; ++j) merge_row(p, 0, partial(b, row / kGroup, j), row % kGroup, l.rank_pad);
      const float factor = maximum == -kInfinity ? 0.0f : 1.0f / total;
      for (int64_t c = 0; c < l.rank_pad; c += kLanes) {
        store(p.sum + c, maximum == -kInfinity ? Vec{} : load(p.sum + c) * factor);
      }
    }
    const T* w = static_cast<const T*>(a.w_uv.data) + head * a.w_uv.stride0;
    for (int64_t v = 0; v < a.value; v += kDotKeys) {
      const T* rows[4];
      for (int j = 0; j < 4; ++j) rows[j] = w + min(v + j, a.value - 1) * a.w_uv.stride1;
      dot_tile<ROWS, true>(sums, l.rank_pad, rows, a.rank, results + v, value_pad, 2 * kDotKeys * a.w_uv.stride1);
    }
    for (int i = 0; i < ROWS; ++i) {
      T* out = static_cast<T*>(a.out) + ((first + i) * a.heads + head) * a.value;
      const float* r = results + i * value_pad;
      int64_t c = 0;
      for (; c + kLanes <= a.value; c += kLanes) store(out + c, load(r + c));
      if (c < a.value) store_some(out + c, load(r + c), a.value - c);
    }
  }

  void run() const {
    Phase queries_and_masks{a.heads + a.batch * a.tokens};
    Phase splits{a.batch * l.groups * l.slots};
    Phase answers{a.heads};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      float* memory = private_memory + thread_index() * private_size;
      queries_and_masks.run([&](int64_t i) {
        if (i < a.heads) {
          make_queries(i, memory);
        } else {
          masks.scan(i - a.heads);
        }
      });
      queries_and_masks.wait();
      splits.run([&](int64_t i) {
        const int64_t b = i / (l.groups * l.slots), group = i / l.slots % l.groups, slot = i % l.slots;
        if (l.slots == 1) {
          attend_all(b, group, memory);
        } else {
          attend_split(b, group, slot, partial(b, group, slot), memory);
        }
      });
      splits.wait();
      answers.run([&](int64_t head) { answer(head, memory); });
    }
  }
};

}  // namespace

void mla_attention(const MlaAttention& args) {
  args.dtype == Dtype::float32 ? Attention<float>(args).run() : Attention<Bf16>(args).run();
}

}  // namespace dsopt::DSOPT_VARIANT
