// Arguments of the native kernels. Strides count elements; the last dimension always has stride 1.
#pragma once

#include <cstdint>

#include "dsopt/isa.h"

namespace dsopt {

enum class Dtype { float32, bfloat16 };

// out[i] = total[i] * rsqrt(mean(total[i]^2) + eps) * weight;  total = x + residual, or x without residual
struct RmsNorm {
  const void* x;
  const void* residual;  // or null
  const void* weight;    // or null
  void* out;             // rows x hidden, dense
  void* total;           // rows x hidden, dense; null without residual
  int64_t rows, hidden;
  int64_t x_stride, residual_stride;
  float eps;
  Dtype dtype;
};

enum class Mask { none, boolean, float32, bfloat16 };

// A matrix stack: address and the strides of all dimensions but the last
struct Tensor3 {
  const void* data;
  int64_t stride0, stride1;
};
struct Tensor4 {
  const void* data;
  int64_t stride0, stride1, stride2;
};

// Absorbed latent attention; shapes and meaning as dsopt.ops.attention.mla_attention_reference
struct MlaAttention {
  int64_t batch, heads, tokens, cached, rank, nope, rope, value;
  Tensor4 q_nope, q_rope;  // batch, heads, tokens, nope | rope
  Tensor3 latent, k_rope;  // batch, cached, rank | rope
  Tensor3 w_uk, w_uv;      // heads, nope | value, rank
  Tensor3 mask;            // batch, tokens, cached
  void* out;               // batch, tokens, heads, value, dense
  float scale;
  float hidden;  // a float mask at or below this hides the key, unless it does so for all keys of a query
  Mask mask_kind;
  Dtype dtype;
  bool causal;
};

}  // namespace dsopt

DSOPT_KERNEL(rms_norm, RmsNorm)
DSOPT_KERNEL(mla_attention, MlaAttention)
