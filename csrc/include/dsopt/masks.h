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
  int64_t flags_size(int64_t queries) const { return queries * (1 + chunks()); }

  uint8_t* flags_of(int64_t query) const { return flags + query * (1 + chunks()); }
  uint8_t kind_of(int64_t query) const { return *flags_of(query); }
  bool sees(int64_t query, int64_t chunk) const { return flags_of(query)[1 + chunk]; }

  // whether scores need anything added at all, but for what lies behind the last key
  bool any() const { return kind != Mask::none || causal; }

  int64_t keys_of(int64_t query) const { return causal ? min(cached, query % tokens + 1) : cached; }

  template <class M>
  const M* values(int64_t query) const {
    const int64_t s = query % tokens, h = query / tokens % heads, b = query / tokens / heads;
    return static_cast<const M*>(mask.data) + b * mask.stride0 + h * mask.stride1 + s * mask.stride2;
  }

  // the largest mask value of n > 0 keys
  template <class M>
  static float largest(const M* p, int64_t n) {
    Vec best = splat(-kInfinity);
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) best = max(load(p + i), best);
    float m = max(best);
    for (; i < n; ++i) m = max(to_float(p[i]), m);
    return m;
  }

  static float largest(const uint8_t* p, int64_t n) {
    uint8_t any = 0;
    for (int64_t i = 0; i < n; ++i) any |= p[i];
    return any ? 0.0f : -kInfinity;
  }

  // finds the kind of a query's mask, and of each chunk whether it has a visible key
  void scan(int64_t query) const {
    switch (kind) {
      case Mask::none: {
        const int64_t keys = keys_of(query);
        uint8_t* visible = flags_of(query);
        *visible++ = keys > 0 ? kNormal : kDead;
        for (int64_t c = 0; c < chunks(); ++c) visible[c] = c * CHUNK < keys;
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
    uint8_t* visible = flags_of(query) + 1;
    const int64_t keys = keys_of(query);
    float best = -kInfinity;
    for (int64_t c = 0; c < chunks(); ++c) {
      const int64_t first = c * CHUNK, n = min(CHUNK, keys - first);
      const float m = n > 0 ? largest(p + first, n) : -kInfinity;
      visible[c] = m > hidden ? 2 : m > -kInfinity;
      best = max(m, best);
    }
    const uint8_t found = best > hidden ? kNormal : best > -kInfinity ? kLiteral : kDead;
    for (int64_t c = 0; c < chunks(); ++c) visible[c] = found == kNormal ? visible[c] == 2 : visible[c];
    *flags_of(query) = found;
  }

  // what is added to a scanned query's scores of keys first .. first + CHUNK
  void make_bias(int64_t query, int64_t first, float* bias) const {
    const uint8_t found = kind_of(query);
    const int64_t n = found == kDead ? 0 : max(int64_t{0}, min(CHUNK, keys_of(query) - first));
    for (int64_t i = 0; i < n; ++i) {
      float m = 0.0f;
      if (kind == Mask::boolean) m = values<uint8_t>(query)[first + i] ? 0.0f : -kInfinity;
      if (kind == Mask::float32) m = values<float>(query)[first + i];
      if (kind == Mask::bfloat16) m = to_float(values<Bf16>(query)[first + i]);
      bias[i] = found == kNormal && m <= hidden ? -kInfinity : m;
    }
    for (int64_t i = n; i < CHUNK; ++i) bias[i] = -kInfinity;
  }
};

}  // namespace dsopt::DSOPT_VARIANT
