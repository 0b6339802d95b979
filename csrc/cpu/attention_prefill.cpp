// Attention of heads that share keys, for many new tokens; the formula is that of attention.cpp.
//
// An item of work is one head of keys and up to kMaxRows rows of one sequence, a row being one head of one new token.
// It goes through the keys in blocks of kBlock, packs keys and values of a block once, and takes all rows by them, a
// tile of a few at a time. So no more than a tile of scores exists at a time. Chunks of keys that no row of a tile sees
// are left out. What a row's answer is made of is fixed by its keys and its mask alone.
#include "dsopt/blocks.h"
#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/parallel.h"
#include "dsopt/softmax.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

constexpr int64_t kMaxRows = 512;

template <class T>
struct Prefill {
  const GroupedAttention& a;
  BlockMasks masks;  // of queries (b * mask_heads + h) * tokens + s
  int64_t shared, rows, value_pad;
  int64_t parts, part_size;  // of the rows of a head of keys
  int threads;
  float* private_memory;
  int64_t private_size;

  // a thread's own memory
  struct Memory {
    float* keys;      // panels of width rows, kBlock columns
    float* values;    // panels of kBlock rows, value_pad columns
    float* tile;      // left operand of width columns
    float* scores;    // [kTileRows][kTileStride]
    float* maximum;   // [part_size]
    float* total;     // [part_size]
    float* sum;       // [part_size][value_pad]
  };

  // some rows of one head of keys
  struct Part {
    int64_t b, kv_head, first, last;
  };

  explicit Prefill(const GroupedAttention& args) : a(args) {
    shared = a.heads / a.kv_heads;
    rows = shared * a.tokens;
    value_pad = round_up(a.value, kPanel);
    threads = team_size(a.batch * a.kv_heads * rows * a.cached * (a.width + a.value));
    parts = (rows + kMaxRows - 1) / kMaxRows;
    if (a.batch * a.kv_heads * parts < threads) parts = (threads - 1) / (a.batch * a.kv_heads) + 1;
    part_size = round_up((rows + parts - 1) / parts, kTileRows);
    parts = (rows + part_size - 1) / part_size;

    masks = {a.mask, a.mask_kind, a.hidden, a.causal, a.mask_heads, a.tokens, a.cached};
    const int64_t flags_size = round_up(masks.flags_size(a.batch * a.mask_heads * a.tokens), 64) / 4;
    private_size = kBlock * (a.width + value_pad) + tile_size(a.width) + tile_size(kBlock) + part_size * (2 + value_pad);
    private_size = round_up(private_size, 16);
    private_memory = static_cast<float*>(
        scratch(static_cast<unsigned long>(threads * private_size + flags_size) * sizeof(float)));
    masks.flags = reinterpret_cast<uint8_t*>(private_memory + threads * private_size);
  }

  Memory memory_of(int thread) const {
    float* p = private_memory + thread * private_size;
    const auto take = [&](int64_t size) { return (p += size) - size; };
    Memory m;
    m.keys = take(kBlock * a.width), m.values = take(kBlock * value_pad);
    m.tile = take(tile_size(a.width)), m.scores = take(tile_size(kBlock));
    m.sum = take(part_size * value_pad), m.maximum = take(part_size), m.total = take(part_size);
    return m;
  }

  int64_t head(const Part& part, int64_t row) const { return part.kv_head * shared + row % shared; }

  int64_t query(const Part& part, int64_t row) const {
    return (part.b * a.mask_heads + (a.mask_heads == 1 ? 0 : head(part, row))) * a.tokens + row / shared;
  }

  static const T* at(const Tensor4& x, int64_t i, int64_t j, int64_t k) {
    return static_cast<const T*>(x.data) + i * x.stride0 + j * x.stride1 + k * x.stride2;
  }

  // the block's chunks that one of rows first .. last sees
  Chunks seen(const Part& part, int64_t first, int64_t last, int64_t block) const {
    Chunks chunks = 0;
    // rows of one token follow each other, and share a mask if all heads do
    for (int64_t r = first; r < last; r += a.mask_heads == 1 ? shared - r % shared : 1) {
      chunks |= seen_chunks(masks, query(part, r), block);
    }
    return chunks;
  }

  // packs keys first .. last of a block, the first of them a chunk's first
  void pack(const Part& part, int64_t block, int64_t first, int64_t last, const Memory& m) const {
    const int64_t start = block * kBlock;
    pack_panels(at(a.k, part.b, part.kv_head, start + first), a.k.stride2, last - first, a.width,
                m.keys + first * a.width, a.width);
    for (int64_t t = first; t < last; ++t) {
      const T* v = at(a.v, part.b, part.kv_head, start + t);
      for (int64_t c = 0; c < a.value; c += kPanel) {
        float* to = m.values + c * kBlock + t * kPanel;
        const int64_t n = min(kPanel, a.value - c);
        int64_t i = 0;
        for (; i + kLanes <= n; i += kLanes) store(to + i, load(v + c + i));
        for (; i < kPanel; ++i) to[i] = i < n ? to_float(v[c + i]) : 0.0f;
      }
    }
  }

  // takes rows r .. r + count by one packed block
  void attend(const Part& part, int64_t r, int64_t count, int64_t block, const Memory& m) const {
    const Chunks chunks = seen(part, r, r + count, block);
    if (!chunks) return;
    int64_t queries[kTileRows];
    for (int64_t i = 0; i < count; ++i) {
      queries[i] = query(part, r + i);
      widen(at(a.q, part.b, head(part, r + i), (r + i) / shared), a.width, a.scale, m.tile, i, 0);
    }
    const int64_t i = r - part.first;
    attend_block(masks, queries, count, {m.keys, m.values, block, a.width, value_pad}, chunks, m.tile, m.scores,
                 m.maximum + i, m.total + i, m.sum + i * value_pad, [&](int64_t j) {
                   const int64_t next = min(r + kTileRows + j, rows - 1);
                   fetch(at(a.q, part.b, head(part, next), next / shared), a.width);
                 });
  }

  void answer(const Part& part, const Memory& m) const {
    const int64_t count = part.last - part.first;
    for (int64_t r = 0; r < count; ++r) m.maximum[r] = -kInfinity, m.total[r] = 0.0f;
    for (int64_t i = 0; i < count * value_pad; i += kLanes) store(m.sum + i, Vec{});
    for (int64_t block = 0; block * kBlock < a.cached; ++block) {
      const Chunks chunks = seen(part, part.first, part.last, block);
      for_each_stretch(chunks, [&](int64_t from, int64_t to) {
        pack(part, block, from * kMaskChunk, min(to * kMaskChunk, a.cached - block * kBlock), m);
      });
      if (!chunks) continue;
      for (int64_t r = part.first; r < part.last; r += kTileRows) {
        attend(part, r, min(kTileRows, part.last - r), block, m);
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = part.first + r, h = head(part, row);
      T* out = static_cast<T*>(a.out) + ((part.b * a.tokens + row / shared) * a.heads + h) * a.value;
      const float factor = answer_factor(m.maximum[r], m.total[r], a.sinks ? a.sinks + h : nullptr);
      const float* x = m.sum + r * value_pad;
      int64_t c = 0;
      for (; c + kLanes <= a.value; c += kLanes) store(out + c, load(x + c) * factor);
      if (c < a.value) store_some(out + c, load(x + c) * factor, a.value - c);
    }
  }

  void run() const {
    Phase scans{a.batch * a.mask_heads * a.tokens};
    Phase answers{a.batch * a.kv_heads * parts};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      const Memory memory = memory_of(thread_index());
      scans.run([&](int64_t query) { masks.scan(query); });
      scans.wait();
      answers.run([&](int64_t i) {
        const int64_t part = i % parts, first = part * part_size, head = i / parts;
        answer({head / a.kv_heads, head % a.kv_heads, first, min(rows, first + part_size)}, memory);
      });
    }
  }
};

}  // namespace

void attention_prefill(const GroupedAttention& args) {
  by_dtype(args.dtype, [&](auto element) { Prefill<decltype(element)>(args).run(); });
}

}  // namespace dsopt::DSOPT_VARIANT
