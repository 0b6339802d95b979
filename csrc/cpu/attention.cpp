// Attention whose keys and values serve several heads each: grouped-query, multi-query and multi-head.
//
//   score[r][t] = scale * <q[r], k[t]> + mask[r][t]
//   out[r]      = sum_t exp(score[r][t]) v[t] / (exp(sink[r]) + sum_t exp(score[r][t]))
//
// The rows r of one head of keys are all the heads that read it, of every new token, so keys and values are read once
// for all of them. Keys are taken in splits of kSplit, and these in chunks of kChunk, which few rows read where they
// lie and many rows as a copy in float32. Each split gives a partial (maximum, sum of weights, weighted sum of values)
// per row; partials are merged in the order of the keys. What a row's answer is made of is fixed by its keys alone, so
// it does not depend on the number of threads, on the batch, or on how long the buffer behind the visible keys is.
#include "dsopt/dtypes.h"
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
constexpr int64_t kGroup = 128;    // rows that share a chunk
constexpr int64_t kBlockRows = 16;  // rows whose queries stay in the first-level cache
constexpr int64_t kFewRows = 8;     // up to so many, widening keys in registers is cheaper than a copy
constexpr int64_t kPad = 16;

template <class T>
struct Grouped {
  const GroupedAttention& a;
  int64_t shared, rows, groups, splits, slots;
  int64_t width_pad, value_pad;
  bool copies;
  int threads;

  QueryMasks<kChunk> masks;  // of queries (b * mask_heads + h) * tokens + s
  float* partials;           // [batch][kv_heads][groups][slots] partials of kGroup rows, if there are several slots
  float* private_memory;
  int64_t private_size;

  // one thread's memory
  struct Room {
    float* queries;  // [kGroup][width_pad]
    float* scores;   // [kGroup][kChunk]
    float* keep;     // [kGroup]
    float* bias;     // [kChunk]
    float* keys;     // [kChunk][width_pad]
    float* values;   // [kChunk][value_pad]
    Partial one, merged;
  };

  // rows of one head of keys, from `first` on
  struct Rows {
    int64_t b, kv_head, first, count, padded;
  };

  explicit Grouped(const GroupedAttention& args) : a(args) {
    shared = a.heads / a.kv_heads;
    rows = shared * a.tokens;
    groups = (rows + kGroup - 1) / kGroup;
    splits = (a.cached + kSplit - 1) / kSplit;
    width_pad = round_up(a.width, kPad);
    value_pad = round_up(a.value, kPad);
    copies = rows > kFewRows || a.width % kLanes || a.value % kLanes;
    threads = team_size(a.batch * a.heads * a.tokens * a.cached * (a.width + a.value));
    // with enough rows for all threads each item takes all splits in turn
    slots = a.batch * a.kv_heads * groups >= 2 * threads ? 1 : splits;
    masks = {a.mask, a.mask_kind, a.hidden, a.causal, a.mask_heads, a.tokens, a.cached};

    const int64_t partials_size = slots > 1 ? a.batch * a.kv_heads * groups * slots * partial_size() : 0;
    const int64_t flags_size = round_up(masks.flags_size(a.batch * a.mask_heads * a.tokens), 64) / 4;
    private_size = kGroup * (width_pad + kChunk + 1) + kChunk * (1 + width_pad + value_pad) + 2 * partial_size();
    const int64_t floats = partials_size + flags_size + threads * private_size;
    partials = static_cast<float*>(scratch(static_cast<unsigned long>(floats) * sizeof(float)));
    private_memory = partials + partials_size;
    masks.flags = reinterpret_cast<uint8_t*>(private_memory + threads * private_size);
  }

  int64_t partial_size() const { return kGroup * (2 + value_pad); }

  Partial partial_at(float* p) const { return {p + kGroup * value_pad, p + kGroup * (value_pad + 1), p}; }

  Room room(int thread) const {
    float* p = private_memory + thread * private_size;
    const auto take = [&p](int64_t size) { return (p += size) - size; };
    Room m;
    m.queries = take(kGroup * width_pad), m.scores = take(kGroup * kChunk);
    m.keys = take(kChunk * width_pad), m.values = take(kChunk * value_pad);
    m.one = partial_at(take(partial_size())), m.merged = partial_at(take(partial_size()));
    m.keep = take(kGroup), m.bias = take(kChunk);
    return m;
  }

  Rows rows_of(int64_t item) const {
    const int64_t group = item % groups, count = min(kGroup, rows - group * kGroup);
    const int64_t head = item / groups;
    return {head / a.kv_heads, head % a.kv_heads, group * kGroup, count, count == 1 ? 1 : round_up(count, kSumRows)};
  }

  int64_t token(const Rows& at, int64_t row) const { return (at.first + row) / shared; }
  int64_t head(const Rows& at, int64_t row) const { return at.kv_head * shared + (at.first + row) % shared; }

  int64_t query(const Rows& at, int64_t row) const {
    return (at.b * a.mask_heads + (a.mask_heads == 1 ? 0 : head(at, row))) * a.tokens + token(at, row);
  }

  const T* key(const Rows& at, int64_t t) const {
    return static_cast<const T*>(a.k.data) + at.b * a.k.stride0 + at.kv_head * a.k.stride1 + t * a.k.stride2;
  }

  const T* values_of(const Rows& at, int64_t t) const {
    return static_cast<const T*>(a.v.data) + at.b * a.v.stride0 + at.kv_head * a.v.stride1 + t * a.v.stride2;
  }

  static void widen_row(const T* from, int64_t n, float* to, int64_t padded) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load_some(from + i, n - i));
    for (i = round_up(n, kLanes); i < padded; i += kLanes) store(to + i, Vec{});
  }

  // scaled queries as float32 rows; those that only fill up a tile are zero
  void make_queries(const Rows& at, float* out) const {
    for (int64_t r = 0; r < at.padded; ++r, out += width_pad) {
      const int64_t row = min(r, at.count - 1);
      const T* q = static_cast<const T*>(a.q.data) + at.b * a.q.stride0 + head(at, row) * a.q.stride1 +
                   token(at, row) * a.q.stride2;
      widen_row(q, r < at.count ? a.width : 0, out, width_pad);
      for (int64_t i = 0; i < width_pad; i += kLanes) store(out + i, load(out + i) * a.scale);
    }
  }

  bool any_visible(const Rows& at, int64_t chunk) const {
    if (!masks.any()) return true;
    // rows of one token follow each other, and share a mask if all heads do
    for (int64_t r = 0; r < at.count; r += a.mask_heads == 1 ? shared - (at.first + r) % shared : 1) {
      if (masks.sees(query(at, r), chunk)) return true;
    }
    return false;
  }

  template <int ROWS, class K>
  static void score_tiles(const float* q, int64_t q_stride, int64_t count, const K* k, int64_t k_stride, int64_t n,
                          int64_t width, int64_t ahead, float* scores) {
    for (int64_t block = 0; block < count; block += kBlockRows) {
      const int64_t end = min(count, block + kBlockRows);
      for (int64_t t = 0; t < n; t += kDotKeys) {
        const K* keys[kDotKeys];
        for (int j = 0; j < kDotKeys; ++j) keys[j] = k + min(t + j, n - 1) * k_stride;
        for (int64_t r = block; r < end; r += ROWS) {
          const float* tile = q + r * q_stride;
          r == 0 ? dot_tile<ROWS, true>(tile, q_stride, keys, width, scores + t, kChunk, ahead)
                 : dot_tile<ROWS>(tile, q_stride, keys, width, scores + r * kChunk + t, kChunk);
        }
      }
    }
  }

  template <int ROWS, class V>
  void sum_tiles(const float* weights, int64_t count, int64_t n, const V* v, int64_t v_stride, int64_t ahead,
                 const float* keep, float* sums) const {
    // a few columns at a time: of many keys they stay in the first-level cache for all rows
    for (int64_t c = 0; c < value_pad; c += kSumVecs * kLanes) {
      const int64_t width = min(kSumVecs * kLanes, (copies ? value_pad : a.value) - c);
      for (int64_t r = 0; r < count; r += ROWS) {
        float* out[ROWS];
        for (int i = 0; i < ROWS; ++i) out[i] = sums + (r + i) * value_pad + c;
        const float* w = weights + r * kChunk;
        r == 0 ? sum_rows<ROWS, kSumVecs, true>(w, kChunk, n, v + c, v_stride, width, keep + r, out, ahead)
               : sum_rows<ROWS, kSumVecs>(w, kChunk, n, v + c, v_stride, width, keep + r, out);
      }
    }
  }

  // ahead: how many keys further on the next chunk lies
  template <class K>
  void attend_keys(const Rows& at, int64_t first, int64_t n, const K* k, int64_t k_stride, const K* v, int64_t v_stride,
                   int64_t ahead, Partial p, const Room& m) const {
    const int64_t width = copies ? width_pad : a.width;
    if (at.count == 1) {
      score_tiles<1>(m.queries, width_pad, 1, k, k_stride, n, width, ahead * k_stride, m.scores);
    } else {
      score_tiles<kDotRows>(m.queries, width_pad, at.padded, k, k_stride, n, width, ahead * k_stride, m.scores);
    }
    const bool masked = masks.any() || n < kChunk;
    int64_t last = -1;
    for (int64_t r = 0; r < at.count; ++r) {
      if (masked && (r == 0 || query(at, r) != last)) make_bias(last = query(at, r), first, m.bias);
      m.keep[r] = soften<kChunk>(m.scores + r * kChunk, masked ? m.bias : nullptr, p.maximum + r, p.total + r);
    }
    for (int64_t r = at.count; r < at.padded; ++r) m.keep[r] = 0.0f;
    if (at.count == 1) {
      sum_tiles<1>(m.scores, 1, n, v, v_stride, ahead * v_stride, m.keep, p.sum);
    } else {
      sum_tiles<kSumRows>(m.scores, at.padded, n, v, v_stride, ahead * v_stride, m.keep, p.sum);
    }
  }

  void make_bias(int64_t query, int64_t first, float* bias) const {
    if (masks.any()) return masks.make_bias(query, first, bias);
    for (int64_t i = 0; i < kChunk; ++i) bias[i] = first + i < a.cached ? 0.0f : -kInfinity;
  }

  void attend_chunk(const Rows& at, int64_t chunk, int64_t next, Partial p, const Room& m) const {
    const int64_t first = chunk * kChunk, n = min(kChunk, a.cached - first), ahead = (next - chunk) * kChunk;
    if (!copies) {
      attend_keys(at, first, n, key(at, first), a.k.stride2, values_of(at, first), a.v.stride2, ahead, p, m);
      return;
    }
    for (int64_t t = 0; t < n; ++t) {
      widen_row(key(at, first + t), a.width, m.keys + t * width_pad, width_pad);
      widen_row(values_of(at, first + t), a.value, m.values + t * value_pad, value_pad);
    }
    attend_keys<float>(at, first, n, m.keys, width_pad, m.values, value_pad, 0, p, m);
  }

  static void clear(const Rows& at, Partial p) {
    for (int64_t r = 0; r < at.count; ++r) p.maximum[r] = -kInfinity, p.total[r] = 0.0f;
  }

  // fills p from the visible chunks of one split; p.sum is left as it was if there is none
  void attend_split(const Rows& at, int64_t split, Partial p, const Room& m) const {
    int64_t chunks[kSplit / kChunk + 1];
    int count = 0;
    const int64_t end = min(masks.chunks(), (split + 1) * (kSplit / kChunk));
    for (int64_t c = split * (kSplit / kChunk); c < end; ++c) {
      if (any_visible(at, c)) chunks[count++] = c;
    }
    clear(at, p);
    if (count == 0) return;
    // the last chunk's next one is what follows, which may be the next split's
    chunks[count] = chunks[count - 1] + 1;
    for (int64_t i = 0; i < at.padded * value_pad; i += kLanes) store(p.sum + i, Vec{});
    for (int i = 0; i < count; ++i) attend_chunk(at, chunks[i], chunks[i + 1], p, m);
  }

  void attend_all(const Rows& at, const Room& m) const {
    clear(at, m.merged);
    for (int64_t split = 0; split < splits; ++split) {
      attend_split(at, split, m.one, m);
      for (int64_t r = 0; r < at.count; ++r) merge_row(m.merged, r, m.one, r, value_pad);
    }
    for (int64_t r = 0; r < at.count; ++r) answer(at, r, m.merged);
  }

  void merge_all(const Rows& at, float* slot, const Room& m) const {
    clear(at, m.merged);
    for (int64_t i = 0; i < slots; ++i, slot += partial_size()) {
      for (int64_t r = 0; r < at.count; ++r) merge_row(m.merged, r, partial_at(slot), r, value_pad);
    }
    for (int64_t r = 0; r < at.count; ++r) answer(at, r, m.merged);
  }

  // divides the sums of row r, and stores them
  void answer(const Rows& at, int64_t r, Partial p) const {
    const int64_t h = head(at, r);
    const bool seen = p.maximum[r] > -kInfinity;
    const float factor = answer_factor(p.maximum[r], p.total[r], a.sinks ? a.sinks + h : nullptr);
    T* out = static_cast<T*>(a.out) + ((at.b * a.tokens + token(at, r)) * a.heads + h) * a.value;
    const float* sums = p.sum + r * value_pad;
    const auto mean = [&](int64_t c) { return seen ? load(sums + c) * factor : Vec{}; };
    int64_t c = 0;
    for (; c + kLanes <= a.value; c += kLanes) store(out + c, mean(c));
    if (c < a.value) store_some(out + c, mean(c), a.value - c);
  }

  void run() const {
    const int64_t heads = a.batch * a.kv_heads * groups;
    Phase scans{masks.any() ? a.batch * a.mask_heads * a.tokens : 0};
    Phase attends{heads * slots};
    Phase merges{slots > 1 ? heads : 0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Room m = room(thread_index());
      scans.run([&](int64_t i) { masks.scan(i); });
      scans.wait();
      int64_t prepared = -1;
      attends.run([&](int64_t i) {
        const Rows at = rows_of(i / slots);
        if (i / slots != prepared) make_queries(at, m.queries);
        prepared = i / slots;
        slots == 1 ? attend_all(at, m) : attend_split(at, i % slots, partial_at(partials + i * partial_size()), m);
      });
      attends.wait();
      merges.run([&](int64_t i) { merge_all(rows_of(i), partials + i * slots * partial_size(), m); });
    }
  }
};

}  // namespace

void attention(const GroupedAttention& args) {
  by_dtype(args.dtype, [&](auto element) { Grouped<decltype(element)>(args).run(); });
}

}  // namespace dsopt::DSOPT_VARIANT
