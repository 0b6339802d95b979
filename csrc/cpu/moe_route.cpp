// The experts of each token: scores, groups, the topk best, their weights.
#include <math.h>

#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/math.h"
#include "dsopt/parallel.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

constexpr int32_t kTaken = -0x7fffffff - 1;

// An integer that orders as floats do, NaN above all and both zeros alike
DSOPT_INLINE int32_t key(float x) {
  if (x != x) return 0x7fffffff;
  x += 0.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Index of the first largest of n keys, which becomes kTaken.
DSOPT_INLINE int64_t take_best(int32_t* keys, int64_t n) {
  int32_t best = kTaken;
  for (int64_t i = 0; i < n; ++i) best = keys[i] > best ? keys[i] : best;
  int64_t i = 0;
  while (i + 1 < n && keys[i] != best) ++i;
  keys[i] = kTaken;
  return i;
}

template <class T>
struct Router {
  const MoeRoute& a;
  int64_t padded;
  int threads;
  char* memory;
  int64_t private_bytes;

  explicit Router(const MoeRoute& args) : a(args) {
    padded = round_up(a.num_experts, kLanes);
    threads = team_size(a.tokens * a.num_experts * (a.topk + 16));
    private_bytes = round_up((2 * padded + a.num_experts + a.num_groups) * 4, 64);
    memory = static_cast<char*>(scratch(static_cast<unsigned long>(threads * private_bytes)));
  }

  // what mixes: scores of the padded row
  void score(const T* logits, float* scores) const {
    const int64_t n = a.num_experts;
    for (int64_t i = 0; i < n; ++i) scores[i] = to_float(logits[i]);
    if (a.scoring == Scoring::sqrtsoftplus) {
      for (int64_t i = 0; i < n; ++i) scores[i] = sqrtf(scores[i] > 20.0f ? scores[i] : log1pf(expf(scores[i])));
      return;
    }
    if (a.scoring == Scoring::sigmoid) {
      for (int64_t i = n; i < padded; ++i) scores[i] = 0.0f;
      for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, sigmoid(load(scores + i)));
      // subnormal scores, which the vectors' exponential makes 0, still order the experts
      for (int64_t i = 0; i < n; ++i) {
        if (const float x = to_float(logits[i]); x < -86.0f) scores[i] = expf(x);
      }
      return;
    }
    for (int64_t i = n; i < padded; ++i) scores[i] = -kInfinity;
    float best = -kInfinity;
    for (int64_t i = 0; i < n; ++i) best = max(scores[i], best);
    Vec sums = {};
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vec e = exp_nonpositive(load(scores + i) - best);
      store(scores + i, e);
      sums += e;
    }
    const float factor = 1.0f / sum(sums);
    for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, load(scores + i) * factor);
  }

  // experts outside the best groups are chosen by `outside`
  void limit_groups(float* choice, int32_t* keys, float* groups) const {
    const int64_t size = a.num_experts / a.num_groups;
    for (int64_t g = 0; g < a.num_groups; ++g) {
      const float* in = choice + g * size;
      int32_t* k = keys + g * size;
      for (int64_t i = 0; i < size; ++i) k[i] = key(in[i]);
      groups[g] = in[take_best(k, size)];
      if (a.top2 && size > 1) groups[g] += in[take_best(k, size)];
    }
    for (int64_t g = 0; g < a.num_groups; ++g) keys[g] = key(groups[g]);
    for (int64_t i = 0; i < a.topk_groups; ++i) take_best(keys, a.num_groups);
    for (int64_t g = 0; g < a.num_groups; ++g) {
      if (keys[g] == kTaken) continue;
      for (int64_t i = 0; i < size; ++i) choice[g * size + i] = a.outside;
    }
  }

  void route(int64_t token, char* at) const {
    float* scores = reinterpret_cast<float*>(at);
    float* choice = scores + padded;
    int32_t* keys = reinterpret_cast<int32_t*>(choice + padded);
    float* groups = reinterpret_cast<float*>(keys + a.num_experts);
    const int64_t n = a.num_experts;

    score(static_cast<const T*>(a.logits) + token * a.stride, scores);
    for (int64_t i = 0; i < n; ++i) choice[i] = a.bias ? scores[i] + a.bias[i] : scores[i];
    if (a.topk_groups < a.num_groups) limit_groups(choice, keys, groups);
    for (int64_t i = 0; i < n; ++i) keys[i] = key(choice[i]);
    float* weights = a.weights + token * a.topk;
    int64_t* ids = a.ids + token * a.topk;
    float total = 0.0f;
    for (int64_t i = 0; i < a.topk; ++i) {
      ids[i] = take_best(keys, n);
      total += weights[i] = scores[ids[i]];
    }
    for (int64_t i = 0; i < a.topk; ++i) {
      if (a.renormalize) weights[i] /= total + a.eps;
      weights[i] *= a.scale;
    }
  }

  void run() const {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t t = 0; t < a.tokens; ++t) route(t, memory + thread_index() * private_bytes);
  }
};

}  // namespace

void moe_route(const MoeRoute& args) {
  by_dtype(args.dtype, [&](auto element) { Router<decltype(element)>(args).run(); });
}

}  // namespace dsopt::DSOPT_VARIANT
