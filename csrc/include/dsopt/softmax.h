// Softmax in pieces: weights relative to the largest score so far, and sums of pieces that are put together.
#pragma once

#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {

// KEYS scores of one row become weights, relative to the row's maximum so far; bias may be null. Returns how much of
// its earlier sums to keep.
template <int64_t KEYS>
inline float soften(float* score, const float* bias, float* maximum, float* total) {
  constexpr int count = KEYS / kLanes;
  Vec v[count];
  Vec best = splat(*maximum);
  for (int j = 0; j < count; ++j) {
    v[j] = load(score + j * kLanes);
    if (bias) {
      // a hidden key's score may be anything, behind the last key even memory that was never written
      const Vec add = load(bias + j * kLanes);
      v[j] = add == -kInfinity ? add : v[j] + add;
    }
    best = max(v[j], best);
  }
  const float m = max(best);
  if (m == -kInfinity) {
    for (int j = 0; j < count; ++j) store(score + j * kLanes, Vec{});
    return 1.0f;
  }
  Vec sums = {};
  for (int j = 0; j < count; ++j) {
    v[j] = exp_nonpositive(v[j] - m);
    sums += v[j];
    store(score + j * kLanes, v[j]);
  }
  const float keep = exp_nonpositive(splat(*maximum - m))[0];
  *total = *total * keep + sum(sums);
  *maximum = m;
  return keep;
}

// What a row's sums are multiplied with to give its answer: 0 if it saw no key. sink: a score beside its keys' whose
// value is zero, or null.
inline float answer_factor(float maximum, float total, const float* sink) {
  if (maximum == -kInfinity) return 0.0f;
  if (!sink) return 1.0f / total;
  const float m = max(*sink, maximum);
  const float kept = exp_nonpositive(splat(maximum - m))[0];
  return kept / (total * kept + exp_nonpositive(splat(*sink - m))[0]);
}

// Sums of rows, each `width` floats long (a multiple of kLanes), weighted relative to the row's maximum
struct Partial {
  float* maximum;  // [row]
  float* total;    // [row] sum of weights
  float* sum;      // [row][width]
};

// row `to` of p takes in row `from` of q
inline void merge_row(Partial p, int64_t to, Partial q, int64_t from, int64_t width) {
  if (q.maximum[from] == -kInfinity) return;
  float* o = p.sum + to * width;
  const float* x = q.sum + from * width;
  if (p.maximum[to] == -kInfinity) {
    p.maximum[to] = q.maximum[from];
    p.total[to] = q.total[from];
    for (int64_t i = 0; i < width; i += kLanes) store(o + i, load(x + i));
    return;
  }
  const float m = max(p.maximum[to], q.maximum[from]);
  const float keep = exp_nonpositive(splat(p.maximum[to] - m))[0];
  const float add = exp_nonpositive(splat(q.maximum[from] - m))[0];
  p.maximum[to] = m;
  p.total[to] = p.total[to] * keep + q.total[from] * add;
  for (int64_t i = 0; i < width; i += kLanes) store(o + i, madd(load(x + i), splat(add), load(o + i) * keep));
}

}  // namespace dsopt::DSOPT_VARIANT
