// Latent attention for few new tokens, in the absorbed form: the cache is read as it is.
//
//   query[h]  = scale * cat(q_nope[h] @ w_uk[h], q_rope[h])
//   score[t]  = <query[h], cat(latent[t], k_rope[t])> + mask[t]
//   out[h]    = w_uv[h] @ (sum_t softmax(score)[t] latent[t])
//
// Keys are taken in splits of kSplit, and these in chunks of kChunk that are widened to float32 once for a
// group of rows (a row is one head of one new token) and used for scores and sums while in cache. Rows lie
// side by side in the lanes of vectors, so a softmax over keys needs no sum across lanes. Each
// split gives a partial (maximum, sum of weights, weighted sum of latents) per row; partials are merged in
// the order of the keys. What a row's answer is made of is fixed by its keys alone, so it does not depend
// on the number of threads, on the batch, or on how long the buffer behind the visible keys is.
#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/lanes.h"
#include "dsopt/masks.h"
#include "dsopt/parallel.h"
#include "dsopt/scales.h"
#include "dsopt/simd.h"
#include "dsopt/softmax.h"
#include "dsopt/tiles.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

constexpr int64_t kChunk = 64;
constexpr int64_t kSplit = 512;
constexpr int64_t kGroup = 64;
constexpr int64_t kPad = 16;
constexpr int64_t kWeightRows = 8;
constexpr int64_t kDotBlock = 8;  // keys

static_assert(kChunk == 64 && kGroup % kPanel == 0, "as key_products takes them; a group is whole panels");

struct Layout {
  int64_t rows, groups, chunks, splits, slots;
  int64_t rank_pad, width, width_pad;  // width: of a query, latent and rotary part
};

template <class T>
struct Attention {
  const MlaAttention& a;
  Layout l;
  int threads;

  float* queries;            // [batch][groups][panels], each as `place` says
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
    l.width = a.rank + a.rope;
    l.width_pad = round_up(l.width, kPad);
    threads = team_size(a.batch * l.rows * (a.rank * (a.nope + a.value) + a.cached * (a.rank + l.width)));
    // with enough rows for all threads each item takes all splits in turn, and only merged partials are kept
    l.slots = a.batch * l.groups >= 2 * threads ? 1 : l.splits;

    const int64_t queries_size = a.batch * l.groups * kGroup * l.width_pad;
    const int64_t partials_size = a.batch * l.groups * l.slots * kGroup * (2 + l.rank_pad);
    const Tensor4 mask{a.mask.data, a.mask.stride0, 0, a.mask.stride1};
    masks = {mask, a.mask_kind, a.hidden, a.causal, 1, a.tokens, a.cached};
    const int64_t flags_size = round_up(masks.flags_size(a.batch * a.tokens), 64) / 4;
    const int64_t value_pad = round_up(a.value, kPad);
    const int64_t block = block_size() + 2 * kPanel * kChunk + kGroup * (2 + l.rank_pad);
    const int64_t heads = kDotRows * (round_up(a.nope, kPad) + l.rank_pad + round_up(a.rope, kPad) + value_pad) +
                          kWeightRows * l.rank_pad;
    private_size = round_up(block > heads ? block : heads, kPad);
    const int64_t floats = queries_size + partials_size + flags_size + threads * private_size;
    queries = static_cast<float*>(scratch(static_cast<unsigned long>(floats) * sizeof(float)));
    partials = queries + queries_size;
    private_memory = partials + partials_size;
    masks.flags = reinterpret_cast<uint8_t*>(private_memory + threads * private_size);
    // lanes without a row: their results are not read, but should not be slow subnormals either
    const int64_t panel = (rows_of(l.groups - 1) - 1) / kPanel, rows = rows_of_panel(l.groups - 1, panel);
    for (int64_t b = 0; b < a.batch; ++b) {
      for (int64_t r = rows; r < vecs(rows) * kLanes; ++r) {
        const Place p = place(b, l.groups - 1, panel, r);
        for (int64_t i = 0; i < l.width_pad; ++i) p.row[i * p.step] = 0.0f;
      }
    }
  }

  // where a row of a panel lies, and how far apart its elements: one behind another, or in lanes
  struct Place {
    float* row;
    int64_t step;
  };

  Place place(int64_t b, int64_t group, int64_t panel, int64_t row) const {
    const int64_t lanes = vecs(rows_of_panel(group, panel)) * kLanes;
    float* p = panel_of(b, group, panel);
    return lanes == kLanes ? Place{p + row * l.width_pad, 1} : Place{p + row, lanes};
  }

  // a chunk of widened keys
  int64_t block_size() const { return wide_slices(l.width) * kChunk * kWideStride; }

  int64_t rows_of_panel(int64_t group, int64_t panel) const { return min(kPanel, rows_of(group) - panel * kPanel); }

  // the vectors a panel's rows take
  int64_t vecs(int64_t rows) const { return (rows + kLanes - 1) / kLanes; }

  float* panel_of(int64_t b, int64_t group, int64_t panel) const {
    return queries + ((b * l.groups + group) * kGroup + panel * kPanel) * l.width_pad;
  }

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
    const int64_t nope_pad = round_up(a.nope, kPad), rope_pad = round_up(a.rope, kPad);
    const float zero[4] = {}, one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    float* const rope = nope + ROWS * nope_pad;
    float* out[4];
    for (int i = 0; i < ROWS; ++i) {
      const int64_t b = (first + i) / a.tokens, s = (first + i) % a.tokens;
      const T* q = static_cast<const T*>(a.q_nope.data) + b * a.q_nope.stride0 + head * a.q_nope.stride1 +
                   s * a.q_nope.stride2;
      for (int64_t d = 0; d < a.nope; ++d) nope[i * nope_pad + d] = to_float(q[d]) * a.scale;
      const T* r = static_cast<const T*>(a.q_rope.data) + b * a.q_rope.stride0 + head * a.q_rope.stride1 +
                   s * a.q_rope.stride2;
      for (int64_t d = 0; d < a.rope; ++d) rope[i * rope_pad + d] = to_float(r[d]) * a.scale;
      out[i] = rope + ROWS * rope_pad + i * l.rank_pad;
      for (int64_t c = 0; c < l.rank_pad; ++c) out[i][c] = 0.0f;
    }
    // a few rows of w at a time: reads memory in order, while the results stay in the first-level cache
    for (int64_t d = 0; d < a.nope; d += kWeightRows) {
      const int64_t count = min(kWeightRows, a.nope - d);
      const float* keep = d == 0 ? zero : one;
      if (a.w_uk_scale.data) {
        widen_weights(a.w_uk, a.w_uk_scale, head, d, count, out[0] + ROWS * l.rank_pad);
        sum_rows<ROWS, kSumVecs>(nope + d, nope_pad, count, out[0] + ROWS * l.rank_pad, l.rank_pad, a.rank, keep, out);
      } else {
        const T* rows = static_cast<const T*>(a.w_uk.data) + head * a.w_uk.stride0 + d * a.w_uk.stride1;
        sum_rows<ROWS, kSumVecs, true>(nope + d, nope_pad, count, rows, a.w_uk.stride1, a.rank, keep, out,
                                       kWeightRows * a.w_uk.stride1);
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      const int64_t b = (first + i) / a.tokens, row = (first + i) % a.tokens * a.heads + head;
      const Place p = place(b, row / kGroup, row % kGroup / kPanel, row % kPanel);
      for (int64_t c = 0; c < a.rank; ++c) p.row[c * p.step] = out[i][c];
      for (int64_t d = 0; d < l.width_pad - a.rank; ++d) {
        p.row[(a.rank + d) * p.step] = d < a.rope ? rope[i * rope_pad + d] : 0.0f;
      }
    }
  }

  // `count` rows of a head's weights in FP8, rank_pad apart
  void widen_weights(const Tensor3& w, const Scales& scales, int64_t head, int64_t first, int64_t count,
                     float* to) const {
    const Fp8* rows = static_cast<const Fp8*>(w.data) + head * w.stride0;
    for (int64_t i = first; i < first + count; ++i, to += l.rank_pad) {
      widen_scaled(rows + i * w.stride1, scales_of(scales, head), i, a.rank, to);
    }
  }

  // elements from .. from + n of x, at most a slice, to where they belong in a key's slice
  static void widen_row(const T* x, int64_t from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(x + from + i));
    // may write behind the slice, where there is room
    if (i < n) store(to + i, load_some(x + from + i, n - i));
  }

  const T* latent(int64_t b, int64_t t) const {
    return static_cast<const T*>(a.latent.data) + b * a.latent.stride0 + t * a.latent.stride1;
  }

  // elements from .. from + n of a latent in FP8, no more than share a scale
  void widen_latent(int64_t b, int64_t t, int64_t from, int64_t n, float* to) const {
    static_assert(kLatentColumns % kWide == 0);
    if (n == 0) return;  // all of the slice is of the rotary part: there is no scale either
    const Fp8* x = static_cast<const Fp8*>(a.latent.data) + b * a.latent.stride0 + t * a.latent.stride1;
    widen_scaled(x + from, scale_at(scales_of(a.latent_scale, b), t, from / kLatentColumns), n, to);
  }

  const T* k_rope(int64_t b, int64_t t) const {
    return static_cast<const T*>(a.k_rope.data) + b * a.k_rope.stride0 + t * a.k_rope.stride1;
  }

  // elements of keys: those of keys first .. last of a chunk, from .. to of each
  struct Part {
    int64_t first, last, from, to;
  };

  // widens a part, one slice or all, of the chunk that starts at key `start`, none behind the last key; zeros follow up
  // to a whole vector
  void widen(int64_t b, int64_t start, Part part, float* block) const {
    for (int64_t t = part.first; t < min(part.last, a.cached - start); ++t) {
      for (int64_t i = part.from; i < part.to; i += kWide) {
        float* slice = block + wide_at(kChunk, t, i);
        if (i + kWide <= min(part.to, a.rank)) {
          if (a.latent_scale.data) {
            widen_latent(b, start + t, i, kWide, slice);
            continue;
          }
          const T* x = latent(b, start + t) + i;
          DSOPT_UNROLL
          for (int64_t j = 0; j < kWide; j += kLanes) store(slice + j, load(x + j));
          continue;
        }
        const int64_t end = min(i + kWide, part.to), of_latent = max(int64_t{0}, min(end, a.rank) - i);
        if (a.latent_scale.data) {
          widen_latent(b, start + t, i, of_latent, slice);
        } else {
          widen_row(latent(b, start + t), i, of_latent, slice);
        }
        widen_row(k_rope(b, start + t), max(i, a.rank) - a.rank, end - i - of_latent, slice + of_latent);
        for (int64_t j = end - i; j % kLanes; ++j) slice[j] = 0.0f;
      }
    }
  }

  // brings the same part of another chunk nearer
  void prefetch(int64_t b, int64_t start, Part part) const {
    constexpr int64_t line = 64 / sizeof(T);
    for (int64_t t = start + part.first; t < min(start + part.last, a.cached); ++t) {
      const int64_t size = a.latent_scale.data ? 1 : sizeof(T);
      const char* x = static_cast<const char*>(a.latent.data) + (b * a.latent.stride0 + t * a.latent.stride1) * size;
      for (int64_t i = part.from * size; i < min(part.to, a.rank) * size; i += 64) __builtin_prefetch(x + i, 0, 2);
      for (int64_t i = max(part.from, a.rank) - a.rank; i < part.to - a.rank; i += line) {
        __builtin_prefetch(k_rope(b, t) + i, 0, 2);
      }
    }
  }

  bool any_visible(int64_t b, int64_t group, int64_t chunk) const {
    const int64_t last = (group * kGroup + rows_of(group) - 1) / a.heads;
    for (int64_t s = group * kGroup / a.heads; s <= last; ++s) {
      if (masks.sees(b * a.tokens + s, chunk)) return true;
    }
    return false;
  }

  // scores of the chunk's keys and rows `first_row` .. of a group, as [key][lane], and the same softened:
  // weights relative to the rows' largest scores, which change, as do their totals
  template <int VECS>
  void soften_panel(int64_t b, int64_t first_row, int64_t rows, int64_t chunk, float* scores, float* bias,
                    float* maximum, float* total, float* keep) const {
    constexpr int64_t lanes = VECS * kLanes;
    const float* add = make_biases(b, first_row, rows, chunk, lanes, bias);
    for (int64_t j = 0; j < lanes; j += kLanes) {
      const Vec before = load(maximum + j);
      Vec best = before;
      for (int64_t t = 0; t < kChunk; ++t) {
        float* score = scores + t * lanes + j;
        Vec v = load(score);
        if (add) {
          // a hidden key's score may be anything, behind the last key even memory that was never written
          const Vec x = load(add + t * lanes + j);
          v = x == -kInfinity ? x : v + x;
          store(score, v);
        }
        best = max(v, best);
      }
      // where nothing was visible so far all scores are -infinity, and so are their differences to anything finite
      const Vec from = best == -kInfinity ? Vec{} : best;
      Vec sums = {};
      for (int64_t t = 0; t < kChunk; ++t) {
        float* score = scores + t * lanes + j;
        const Vec v = exp_nonpositive(load(score) - from);
        sums += v;
        store(score, v);
      }
      const Vec kept = best == -kInfinity ? splat(1.0f) : exp_nonpositive(before - from);
      store(keep + j, kept);
      store(total + j, madd(load(total + j), kept, sums));
      store(maximum + j, best);
    }
  }

  // what the masks add to scores [key][lane] of a chunk, or null if nothing
  const float* make_biases(int64_t b, int64_t first_row, int64_t rows, int64_t chunk, int64_t lanes,
                           float* bias) const {
    const int64_t first = first_row / a.heads, last = (first_row + rows - 1) / a.heads;
    bool plain = true;
    for (int64_t s = first; s <= last; ++s) plain &= masks.chunk_of(b * a.tokens + s, chunk) == kPlain;
    if (plain) return nullptr;
    for (int64_t i = 0; i < kChunk * lanes; ++i) bias[i] = 0.0f;
    float of_token[kChunk];
    for (int64_t s = first; s <= last; ++s) {
      masks.make_bias(b * a.tokens + s, chunk * kChunk, of_token);
      const int64_t from = max(first_row, s * a.heads), to = min(first_row + rows, (s + 1) * a.heads);
      for (int64_t t = 0; t < kChunk; ++t) {
        for (int64_t r = from; r < to; ++r) bias[t * lanes + r - first_row] = of_token[t];
      }
    }
    return bias;
  }

  // one panel of a group's rows and one chunk of keys, widened here if this is the group's first panel
  template <int VECS>
  void attend_panel(int64_t b, int64_t group, int64_t panel, int64_t chunk, int64_t next, Partial p,
                    float* block) const {
    constexpr int64_t lanes = VECS * kLanes;
    float* scores = block + block_size();
    float* bias = scores + kPanel * kChunk;
    float keep[lanes];
    const int64_t rows = rows_of_panel(group, panel), at = panel * kPanel;
    const int64_t first = chunk * kChunk, n = min(kChunk, a.cached - first);
    const float* queries_of_panel = panel_of(b, group, panel);
    // a few lines at a time, beside products: many at once would wait for memory
    const auto fetch = [&](int64_t t, int64_t keys, int64_t from, int64_t to) __attribute__((always_inline)) {
      if (panel == 0 && next >= 0) prefetch(b, next * kChunk, {t, t + keys, from, to});
    };
    if constexpr (VECS == 1) {
      // lanes that no row fills get a score, too
      const int64_t used = round_up(rows, kDotKeys), some = (kDotBlock * kDotKeys + used - 1) / used;
      for (int64_t t = 0; used < lanes && t < kChunk; ++t) store(scores + t * lanes, Vec{});
      // some keys and four rows stay in the first-level cache
      for (int64_t from = 0; from < n; from += kDotBlock) {
        if (panel == 0) widen(b, first, {from, from + kDotBlock, 0, l.width}, block);
        for (int64_t r = 0; r < used; r += kDotKeys) {
          fetch(from + r / kDotKeys * some, some, 0, l.width);
          for (int64_t t = from; t < from + kDotBlock; t += kDotRows) {
            dot_keys(block + t * kWideStride, kChunk, queries_of_panel + r * l.width_pad, l.width_pad, l.width,
                     scores + t * lanes + r);
          }
        }
      }
    } else {
      for (int64_t i = 0; i < l.width; i += kWide) {
        const int64_t end = min(i + kWide, l.width);
        if (panel == 0) widen(b, first, {0, n, i, end}, block);
        key_products<VECS>(block + wide_at(kChunk, 0, i), queries_of_panel + i * lanes, end - i, i > 0, scores,
                           [&](int64_t t, int64_t keys) { fetch(t, keys, i, end); });
      }
    }
    soften_panel<VECS>(b, group * kGroup + at, rows, chunk, scores, bias, p.maximum + at, p.total + at, keep);
    for (int64_t c = 0; c < l.rank_pad;) {
      // a whole tile, or single vectors up to the end of the slice
      const bool whole = c + kPanel <= l.rank_pad;
      const auto weigh = whole ? weigh_rows<kTileVecs> : weigh_rows<1>;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        weigh(min(kTileRows, rows - r), scores + r, lanes, n, block + wide_at(kChunk, 0, c), keep + r,
              p.sum + (at + r) * l.rank_pad + c, l.rank_pad);
      }
      c += whole ? kPanel : kLanes;
    }
  }

  void attend_chunk(int64_t b, int64_t group, int64_t chunk, int64_t next, Partial p, float* memory) const {
    for (int64_t panel = 0; panel * kPanel < rows_of(group); ++panel) {
      switch (vecs(rows_of_panel(group, panel))) {
        case 1: attend_panel<1>(b, group, panel, chunk, next, p, memory); break;
        case 2: attend_panel<2>(b, group, panel, chunk, next, p, memory); break;
        case 3: if constexpr (kTileVecs > 2) attend_panel<3>(b, group, panel, chunk, next, p, memory); break;
        case 4: if constexpr (kTileVecs > 2) attend_panel<4>(b, group, panel, chunk, next, p, memory); break;
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
    for (int64_t i = 0; i < rows_of(group) * l.rank_pad; ++i) p.sum[i] = 0.0f;
    for (int i = 0; i < count; ++i) attend_chunk(b, group, chunks[i], chunks[i + 1], p, memory);
  }

  void attend_all(int64_t b, int64_t group, float* memory) const {
    const Partial merged = partial(b, group, 0);
    const Partial one = partial_at(memory + block_size() + 2 * kPanel * kChunk);
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
      // behind the latent a block holds other things
      for (int64_t c = a.rank; c < l.rank_pad; ++c) p.sum[c] = 0.0f;
    }
    for (int64_t v = 0; v < a.value; v += kDotKeys) {
      if (a.w_uv_scale.data) {
        float* const wide = sums + ROWS * l.rank_pad;
        const int64_t count = min(kDotKeys, a.value - v);
        widen_weights(a.w_uv, a.w_uv_scale, head, v, count, wide);
        const float* rows[4];
        for (int64_t j = 0; j < 4; ++j) rows[j] = wide + min(j, count - 1) * l.rank_pad;
        dot_tile<ROWS>(sums, l.rank_pad, rows, a.rank, results + v, value_pad);
        continue;
      }
      const T* w = static_cast<const T*>(a.w_uv.data) + head * a.w_uv.stride0;
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
  by_dtype(args.dtype, [&](auto element) { Attention<decltype(element)>(args).run(); });
}

}  // namespace dsopt::DSOPT_VARIANT
