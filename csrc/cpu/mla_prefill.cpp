// Latent attention for many new tokens, in the expanded form: keys and values of a head are made from the latent.
//
//   k[t]   = cat(w_uk[h] @ latent[t], k_rope[t]),  v[t] = w_uv[h] @ latent[t]
//   out[s] = sum_t softmax_t(scale * <q[s], k[t]> + mask[s, t]) v[t]
//
// An item of work is one head and up to kMaxQueries queries of one sequence. It goes through the keys in blocks of
// kBlock: expands one, then takes all queries by it, a tile of a few rows at a time, keeping of each a maximum, a sum
// of weights and a weighted sum of values. So a key is expanded once for each head (and kMaxQueries queries), no
// more than a tile of scores exists at a time, and a thread's memory is bounded: with V2's widths 1 MB of weights,
// keys and values and 0.5 KB a query. Chunks of keys that no query of a tile sees are left out, those that none of
// the item sees are not expanded. What a row's answer is made of is fixed by its keys and its mask alone.
#include "dsopt/blocks.h"
#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/parallel.h"
#include "dsopt/scales.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

constexpr int64_t kMaxQueries = 2048;

template <class T>
struct Prefill {
  const MlaAttention& a;
  BlockMasks masks;  // of queries b * tokens + s
  int64_t depth, nope_pad, value_pad;
  int64_t parts, part_size;  // of the queries of a sequence
  int threads;
  float* private_memory;
  int64_t private_size;

  // a thread's own memory
  struct Memory {
    float* w_uk;          // panels of rank rows, nope_pad columns
    float* w_uv;          // panels of rank rows, value_pad columns
    float* nope;          // [kBlock][nope_pad]
    float* keys;          // panels of depth rows, kBlock columns
    float* values;        // panels of kBlock rows, value_pad columns
    float* tile;          // left operand of rank or depth columns
    float* scores;        // [kTileRows][kTileStride]
    float* wide;          // one latent, or a head's weights, that are in FP8
    float *maximum, *total;  // [part_size]
    float* sum;           // [part_size][value_pad]
    int64_t head;         // whose weights are there
  };

  explicit Prefill(const MlaAttention& args) : a(args) {
    depth = a.nope + a.rope;
    nope_pad = round_up(a.nope, kPanel);
    value_pad = round_up(a.value, kPanel);
    threads = team_size(a.batch * a.heads * a.cached * (a.rank * (a.nope + a.value) + a.tokens * (depth + a.value)));
    parts = (a.tokens + kMaxQueries - 1) / kMaxQueries;
    if (a.batch * a.heads * parts < threads) parts = (threads - 1) / (a.batch * a.heads) + 1;
    part_size = round_up((a.tokens + parts - 1) / parts, kTileRows);
    parts = (a.tokens + part_size - 1) / part_size;

    const Tensor4 mask{a.mask.data, a.mask.stride0, 0, a.mask.stride1};
    masks = {mask, a.mask_kind, a.hidden, a.causal, 1, a.tokens, a.cached};
    const int64_t flags_size = round_up(masks.flags_size(a.batch * a.tokens), 64) / 4;
    private_size = sizes().total;
    private_memory = static_cast<float*>(
        scratch(static_cast<unsigned long>(threads * private_size + flags_size) * sizeof(float)));
    masks.flags = reinterpret_cast<uint8_t*>(private_memory + threads * private_size);
  }

  struct Sizes {
    int64_t weights_k, weights_v, nope, keys, values, tile, scores, wide, row, sum, total;
  };

  Sizes sizes() const {
    Sizes s{a.rank * nope_pad, a.rank * value_pad, kBlock * nope_pad, kBlock * depth, kBlock * value_pad,
            tile_size(max(a.rank, depth)), tile_size(kBlock), wide_size(), round_up(part_size, 16),
            part_size * value_pad, 0};
    s.total = s.weights_k + s.weights_v + s.nope + s.keys + s.values + s.tile + s.scores + s.wide + 2 * s.row + s.sum;
    s.total = round_up(s.total, 16);
    return s;
  }

  int64_t wide_size() const {
    if (a.w_uk_scale.data) return max(a.nope, a.value) * a.rank;
    return a.latent_scale.data ? a.rank : 0;
  }

  Memory memory_of(int thread) const {
    const Sizes s = sizes();
    float* p = private_memory + thread * private_size;
    const auto take = [&](int64_t size) { return (p += size) - size; };
    Memory m;
    m.w_uk = take(s.weights_k), m.w_uv = take(s.weights_v);
    m.nope = take(s.nope), m.keys = take(s.keys), m.values = take(s.values);
    m.tile = take(s.tile), m.scores = take(s.scores), m.wide = take(s.wide);
    m.maximum = take(s.row), m.total = take(s.row), m.sum = take(s.sum);
    m.head = -1;
    return m;
  }

  template <class E = T>
  static const E* row(const Tensor3& x, int64_t i, int64_t j) {
    return static_cast<const E*>(x.data) + i * x.stride0 + j * x.stride1;
  }

  static const T* row(const Tensor4& x, int64_t i, int64_t j, int64_t k) {
    return static_cast<const T*>(x.data) + i * x.stride0 + j * x.stride1 + k * x.stride2;
  }

  // the block's chunks that one of queries first .. last sees
  Chunks seen(int64_t b, int64_t first, int64_t last, int64_t block) const {
    Chunks chunks = 0;
    for (int64_t s = first; s < last; ++s) chunks |= seen_chunks(masks, b * a.tokens + s, block);
    return chunks;
  }

  // makes keys and values of the block's keys first .. last, the first of them a chunk's first
  void expand(int64_t head, int64_t b, int64_t block, int64_t first, int64_t last, const Memory& m) const {
    const int64_t at = block * kBlock;
    for (int64_t t = first; t < last; t += kTileRows) {
      const int64_t rows = min(kTileRows, last - t);
      for (int64_t r = 0; r < rows; ++r) {
        if (!a.latent_scale.data) {
          widen(row(a.latent, b, at + t + r), a.rank, 1.0f, m.tile, r, 0);
          continue;
        }
        widen_scaled(row<Fp8>(a.latent, b, at + t + r), scales_of(a.latent_scale, b), at + t + r, a.rank, m.wide);
        widen(m.wide, a.rank, 1.0f, m.tile, r, 0);
      }
      for (int64_t r = t + kTileRows; r < min(last, t + 2 * kTileRows); ++r) {
        a.latent_scale.data ? fetch(row<Fp8>(a.latent, b, at + r), a.rank) : fetch(row(a.latent, b, at + r), a.rank);
      }
      for (int64_t c = 0; c < nope_pad; c += kPanel) {
        panel_product(rows, m.tile, m.w_uk + c * a.rank, a.rank, kPanel, m.nope + t * nope_pad + c, nope_pad);
      }
      for (int64_t c = 0; c < value_pad; c += kPanel) {
        panel_product(rows, m.tile, m.w_uv + c * a.rank, a.rank, kPanel, m.values + c * kBlock + t * kPanel, kPanel);
      }
    }
    float* keys = m.keys + first * depth;
    pack_panels(m.nope + first * nope_pad, nope_pad, last - first, a.nope, keys, depth);
    pack_panels(row(a.k_rope, b, at + first), a.k_rope.stride1, last - first, a.rope, keys + a.nope * kPanel, depth);
  }

  // takes queries s .. s + rows, whose sums are at row `at`, by one expanded block
  void attend(int64_t head, int64_t b, int64_t s, int64_t rows, int64_t block, int64_t at, const Memory& m) const {
    const Chunks chunks = seen(b, s, s + rows, block);
    if (!chunks) return;
    int64_t queries[kTileRows];
    for (int64_t r = 0; r < rows; ++r) {
      queries[r] = b * a.tokens + s + r;
      widen(row(a.q_nope, b, head, s + r), a.nope, a.scale, m.tile, r, 0);
      widen(row(a.q_rope, b, head, s + r), a.rope, a.scale, m.tile, r, a.nope);
    }
    attend_block(masks, queries, rows, {m.keys, m.values, block, depth, value_pad}, chunks, m.tile, m.scores,
                 m.maximum + at, m.total + at, m.sum + at * value_pad, [&](int64_t r) {
                   // each of them may lie in a page of its own
                   const int64_t next = min(s + kTileRows + r, a.tokens - 1);
                   fetch(row(a.q_nope, b, head, next), a.nope);
                   fetch(row(a.q_rope, b, head, next), a.rope);
                 });
  }

  void pack_weights(int64_t head, Memory* m) const {
    if (m->head == head) return;
    pack_weight(a.w_uk, a.w_uk_scale, head, a.nope, m->w_uk, m->wide);
    pack_weight(a.w_uv, a.w_uv_scale, head, a.value, m->w_uv, m->wide);
    m->head = head;
  }

  void pack_weight(const Tensor3& w, const Scales& scales, int64_t head, int64_t rows, float* panels,
                   float* wide) const {
    if (!scales.data) return pack_panels(row(w, head, 0), w.stride1, rows, a.rank, panels, a.rank);
    for (int64_t i = 0; i < rows; ++i) {
      widen_scaled(row<Fp8>(w, head, i), scales_of(scales, head), i, a.rank, wide + i * a.rank);
    }
    pack_panels(wide, a.rank, rows, a.rank, panels, a.rank);
  }

  // the answers of queries first .. last of one head
  void answer(int64_t head, int64_t b, int64_t first, int64_t last, Memory* m) const {
    for (int64_t r = 0; r < last - first; ++r) m->maximum[r] = -kInfinity, m->total[r] = 0.0f;
    for (int64_t i = 0; i < (last - first) * value_pad; ++i) m->sum[i] = 0.0f;
    for (int64_t block = 0; block * kBlock < a.cached; ++block) {
      const Chunks chunks = seen(b, first, last, block);
      if (!chunks) continue;
      pack_weights(head, m);
      for_each_stretch(chunks, [&](int64_t from, int64_t to) {
        expand(head, b, block, from * kMaskChunk, min(to * kMaskChunk, a.cached - block * kBlock), *m);
      });
      for (int64_t s = first; s < last; s += kTileRows) {
        attend(head, b, s, min(kTileRows, last - s), block, s - first, *m);
      }
    }
    for (int64_t r = 0; r < last - first; ++r) {
      T* out = static_cast<T*>(a.out) + ((b * a.tokens + first + r) * a.heads + head) * a.value;
      // a query that saw no key has sums of zero
      const float factor = m->maximum[r] == -kInfinity ? 0.0f : 1.0f / m->total[r];
      const float* x = m->sum + r * value_pad;
      int64_t c = 0;
      for (; c + kLanes <= a.value; c += kLanes) store(out + c, load(x + c) * factor);
      if (c < a.value) store_some(out + c, load(x + c) * factor, a.value - c);
    }
  }

  void run() const {
    Phase scans{a.batch * a.tokens};
    Phase answers{a.heads * a.batch * parts};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      Memory memory = memory_of(thread_index());
      scans.run([&](int64_t query) { masks.scan(query); });
      scans.wait();
      answers.run([&](int64_t i) {
        const int64_t head = i / (a.batch * parts), b = i / parts % a.batch, first = i % parts * part_size;
        answer(head, b, first, min(a.tokens, first + part_size), &memory);
      });
    }
  }
};

}  // namespace

void mla_prefill(const MlaAttention& args) {
  by_dtype(args.dtype, [&](auto element) { Prefill<decltype(element)>(args).run(); });
}

}  // namespace dsopt::DSOPT_VARIANT
