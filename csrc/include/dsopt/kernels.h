// Arguments of the native kernels. Strides count elements; the last dimension always has stride 1.
#pragma once

#include <cstdint>

#include "dsopt/isa.h"

namespace dsopt {

enum class Dtype { float32, bfloat16, float16 };

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

// Scales of a stack of matrices in FP8: one for each block of rows x columns; null for matrices that have none
struct Scales {
  const void* data;
  int64_t stride0, stride1;  // elements from one matrix to the next, from one row of blocks to the next
  int64_t rows, columns;     // of a block
  bool exponents;            // bytes e that stand for 2^(e - 127), else float32
};

// columns of a latent in FP8 that share a scale
constexpr int64_t kLatentColumns = 128;

// Latent attention, absorbed or expanded; shapes and meaning as dsopt.ops.attention.mla_attention_reference
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
  Scales w_uk_scale, w_uv_scale;  // of heads; where they are not null the weights are in FP8
  Scales latent_scale;            // of sequences, a token's for kLatentColumns; where it is not null the latent is in FP8
};

// Attention of heads that share keys; shapes and meaning as dsopt.ops.attention.attention_reference
struct GroupedAttention {
  int64_t batch, heads, kv_heads, tokens, cached, width, value;
  Tensor4 q, k, v;     // batch, heads | kv_heads, tokens | cached, width | value
  Tensor4 mask;        // batch, mask_heads, tokens, cached
  int64_t mask_heads;  // heads, or 1 if all share one mask
  const float* sinks;  // heads, dense; or null
  void* out;           // batch, tokens, heads, value, dense
  float scale;
  float hidden;  // as in MlaAttention
  Mask mask_kind;
  Dtype dtype;
  bool causal;
};

enum class Activation { silu, gelu, gelu_tanh, relu, relu2, swiglu_oai };

// A stack of MLPs: down @ (act(gate) * up) with gate and up = w @ x + b, or down @ act(gate) without up.
// Biases: address, elements from one MLP to the next, from one row to the next; or null.
struct Mlps {
  Tensor3 gate, up, down;
  Tensor3 gate_bias, up_bias, down_bias;
  Scales gate_scale, up_scale, down_scale;
  int64_t intermediate;
  Activation activation;
  float limit;  // infinity for none
};

// out[t] = shared(x[t]) + sum_k weights[t][k] * routed[ids[t][k]](x[t]); meaning as
// dsopt.ops.experts.moe_experts_reference, and gated_mlp_reference if nothing is routed
struct MoeExperts {
  int64_t tokens, hidden, out_hidden, topk, num_experts;
  const void* x;
  int64_t x_stride;
  const int64_t* ids;
  int64_t ids_stride0, ids_stride1;
  const float* weights;
  int64_t weights_stride0, weights_stride1;
  Mlps routed;
  Mlps shared;  // one MLP, or intermediate 0 for none
  void* out;    // tokens x out_hidden, dense
  Dtype dtype;
  bool fp8;     // all matrices are, with scales; biases are not
};

// out[i] = x @ w[i]^T + bias[i] for `count` weights
struct MultiLinear {
  int64_t tokens, in_features, count;
  const void* x;
  int64_t x_stride;
  struct Weight {
    const void* data;
    int64_t stride, out_features;
    const void* bias;  // dense, or null
    void* out;         // tokens x out_features, dense
    Scales scale;
  };
  const Weight* weights;
  Dtype dtype, out_dtype;  // the results' is the operands' or float32
  bool fp8;                // all weights are, with scales; biases are not
};

enum class Scoring { softmax, sigmoid, sqrtsoftplus };

// weights and ids of the topk experts of each token; meaning as dsopt.ops.route.moe_route_reference
struct MoeRoute {
  const void* logits;  // tokens x num_experts
  int64_t stride;
  const float* bias;  // or null
  float* weights;     // tokens x topk, dense, as ids
  int64_t* ids;
  int64_t tokens, num_experts, topk, num_groups, topk_groups;
  float outside, eps, scale;
  Scoring scoring;
  bool top2, renormalize;
  Dtype dtype;
};

// Rotary embedding; meaning as dsopt.ops.rope.rope_reference
struct Rope {
  int64_t sizes[4];          // three outer dimensions and dim
  const void* x;             // elements of a row are neighbours
  const void *cos, *sin;     // rows of dim, or of dim / 2
  int64_t x_strides[3], cos_strides[3], sin_strides[3];
  int64_t cos_next, sin_next;  // from one element of a row to the next
  void* out;                 // dense
  bool interleaved_in, interleaved_out;
  bool full_tables;          // rows of dim
  Dtype dtype, table_dtype;
};

}  // namespace dsopt

DSOPT_KERNEL(rms_norm, RmsNorm)
DSOPT_KERNEL(mla_attention, MlaAttention)
DSOPT_KERNEL(mla_prefill, MlaAttention)
DSOPT_KERNEL(attention, GroupedAttention)
DSOPT_KERNEL(attention_prefill, GroupedAttention)
DSOPT_FP8_KERNEL(moe_experts, MoeExperts)
DSOPT_FP8_KERNEL(multi_linear, MultiLinear)
DSOPT_KERNEL(moe_route, MoeRoute)
DSOPT_KERNEL(rope, Rope)
