// Which keys each query of an attention may see, and what is added to its scores.
#pragma once

#include "dsopt/kernels.h"
#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {

// what a query's mask says of all its keys
enum : uint8_t {
  kDead,     // hides all of them: the answer is zero
  kNormal,   // values at or below `hidden` hide a key
  kLiteral,  // no value above `hidden`: only -infinity hides, the rest is added as it is
};

// what it says of a chunk of them
enum : uint8_t {
  kHidden,  // hides all
  kSome,    // make_bias tells
  kPlain,   // hides none and adds nothing
};

// Masks of the queries (b, h, s), numbered (b * heads + h) * tokens + s, over keys in chunks of CHUNK
template <int64_t CHUNK>
struct QueryMasks {
  Tensor4 mask;  // batch, heads, tokens, cached
  Mask kind;
  float hidden;
  bool causal;
  int64_t heads, tokens, cached;  // heads is 1 where all share one mask
  uint8_t* flags = nullptr;       // memory of flags_size(queries) bytes

  int64_t chunks() const { return (cached + CHUNK - 1) / CHUNK; }
  int64_t flags_size(int64_t queries) const { return queries * (kFront + chunks()); }

  // what a scan finds: the end of the visible keys, the kind of the mask, that of each chunk
  static constexpr int64_t kFront = sizeof(int64_t) + 1;
  uint8_t* flags_of(int64_t query) const { return flags + query * (kFront + chunks()); }
  uint8_t kind_of(int64_t query) const { return flags_of(query)[kFront - 1]; }
  uint8_t chunk_of(int64_t query, int64_t chunk) const { return flags_of(query)[kFront + chunk]; }
  int64_t end_of(int64_t query) const {
    int64_t end;
    __builtin_memcpy(&end, flags_of(query), sizeof end);
    return end;
  }
  bool sees(int64_t query, int64_t chunk) const { return chunk_of(query, chunk) != kHidden; }

  // whether scores need anything added at all, but for what lies behind the last key
  bool any() const { return kind != Mask::none || causal; }

  int64_t keys_of(int64_t query) const { return causal ? min(cached, query % tokens + 1) : cached; }

  template <class M>
  const M* values(int64_t query) const {
    const int64_t s = query % tokens, h = query / tokens % heads, b = query / tokens / heads;
    return static_cast<const M*>(mask.data) + b * mask.stride0 + h * mask.stride1 + s * mask.stride2;
  }

  struct Range {
    float largest;
    bool plain;  // none is hidden, and nothing to be added
  };

  // of n > 0 keys
  template <class M>
  static Range range(const M* p, int64_t n) {
    Vec best = splat(-kInfinity);
    VecI other = {};
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      const Vec v = load(p + i);
      best = max(v, best);
      other |= v != Vec{};
    }
    float m = max(best);
    int32_t any = 0;
    for (int lane = 0; lane < kLanes; ++lane) any |= other[lane];
    for (; i < n; ++i) {
      m = max(to_float(p[i]), m);
      any |= to_float(p[i]) != 0.0f;
    }
    return {m, any == 0};
  }

  template <class M>
  bool hides(M value, uint8_t its_kind) const {
    return to_float(value) <= (its_kind == kNormal ? hidden : -kInfinity);
  }
  bool hides(uint8_t value, uint8_t) const { return !value; }

  static Range range(const uint8_t* p, int64_t n) {
    uint8_t any = 0, all = 1;
    for (int64_t i = 0; i < n; ++i) {
      any |= p[i];
      all &= p[i] != 0;
    }
    return {any ? 0.0f : -kInfinity, all != 0};
  }

  // notes the end and the kind; returns where the chunks' kinds go
  uint8_t* found(int64_t query, int64_t end, uint8_t its_kind) const {
    uint8_t* front = flags_of(query);
    __builtin_memcpy(front, &end, sizeof end);
    front[kFront - 1] = its_kind;
    return front + kFront;
  }

  // finds the end of the visible keys, the kind of a query's mask and that of each chunk
  void scan(int64_t query) const {
    switch (kind) {
      case Mask::none: {
        const int64_t keys = keys_of(query);
        uint8_t* visible = found(query, keys, keys > 0 ? kNormal : kDead);
        for (int64_t c = 0; c < chunks(); ++c) {
          const int64_t n = keys - c * CHUNK;
          visible[c] = n <= 0 ? kHidden : n < CHUNK ? kSome : kPlain;
        }
        return;
      }
      case Mask::boolean: return scan_values<uint8_t>(query);
      case Mask::float32: return scan_values<float>(query);
      case Mask::bfloat16: return scan_values<Bf16>(query);
    }
  }

  template <class M>
  void scan_values(int64_t query) const {
    const M* p = values<M>(query);
    uint8_t* visible = flags_of(query) + kFront;
    const int64_t keys = keys_of(query);
    float best = -kInfinity;
    constexpr uint8_t low = 0xff;  // visible only where nothing else is
    for (int64_t c = 0; c < chunks(); ++c) {
      const int64_t first = c * CHUNK, n = min(CHUNK, keys - first);
      const Range r = n > 0 ? range(p + first, n) : Range{-kInfinity, false};
      visible[c] = r.largest > -kInfinity ? low : kHidden;
      if (r.largest > hidden) visible[c] = r.plain && n == CHUNK ? kPlain : kSome;
      best = max(r.largest, best);
    }
    const uint8_t its_kind = best > hidden ? kNormal : best > -kInfinity ? kLiteral : kDead;
    int64_t end = 0;
    for (int64_t c = 0; c < chunks(); ++c) {
      if (visible[c] == low) visible[c] = its_kind == kLiteral ? kSome : kHidden;
      if (visible[c] != kHidden) end = min(keys, (c + 1) * CHUNK);
    }
    while (end > 0 && hides(p[end - 1], its_kind)) --end;
    found(query, end, its_kind);
  }

  // what is added to a scanned query's scores of keys first .. first + CHUNK
  void make_bias(int64_t query, int64_t first, float* bias) const {
    const uint8_t its_kind = kind_of(query);
    const int64_t n = its_kind == kDead ? 0 : max(int64_t{0}, min(CHUNK, keys_of(query) - first));
    switch (kind) {
      case Mask::none:
        for (int64_t i = 0; i < n; ++i) bias[i] = 0.0f;
        break;
      case Mask::boolean: {
        const uint8_t* p = values<uint8_t>(query) + first;
        for (int64_t i = 0; i < n; ++i) bias[i] = p[i] ? 0.0f : -kInfinity;
        break;
      }
      case Mask::float32: copy_bias(values<float>(query) + first, n, its_kind, bias); break;
      case Mask::bfloat16: copy_bias(values<Bf16>(query) + first, n, its_kind, bias); break;
    }
    for (int64_t i = n; i < CHUNK; ++i) bias[i] = -kInfinity;
  }

  template <class M>
  void copy_bias(const M* p, int64_t n, uint8_t its_kind, float* bias) const {
    const float lowest = its_kind == kNormal ? hidden : -kInfinity;
    for (int64_t i = 0; i < n; ++i) {
      const float m = to_float(p[i]);
      bias[i] = m <= lowest ? -kInfinity : m;
    }
  }
};

}  // namespace dsopt::DSOPT_VARIANT
