// RMS norm of rows, alone or behind a residual add.
#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/parallel.h"
#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

// total = x + residual, rounded to T
template <class T>
void add_row(const T* x, const T* residual, T* total, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(total + i, load(x + i) + load(residual + i));
  if (i < n) store_some(total + i, load_some(x + i, n - i) + load_some(residual + i, n - i), n - i);
}

template <class T>
float square_sum(const T* x, int64_t n) {
  Vec acc[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    DSOPT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const Vec v = load(x + i + j * kLanes);
      acc[j] = madd(v, v, acc[j]);
    }
  }
  for (; i + kLanes <= n; i += kLanes) acc[0] = madd(load(x + i), load(x + i), acc[0]);
  if (i < n) {
    const Vec v = load_some(x + i, n - i);
    acc[1] = madd(v, v, acc[1]);
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3]));
}

// out = x * factor * weight
template <class T>
void scale_row(const T* x, const T* weight, T* out, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec v = load(x + i) * factor;
    store(out + i, weight ? v * load(weight + i) : v);
  }
  if (i < n) {
    const Vec v = load_some(x + i, n - i) * factor;
    store_some(out + i, weight ? v * load_some(weight + i, n - i) : v, n - i);
  }
}

template <class T>
void run(const RmsNorm& a) {
  const T* weight = static_cast<const T*>(a.weight);
  const int threads = team_size(a.rows * a.hidden * 4);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < a.rows; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    if (a.residual) {
      T* total = static_cast<T*>(a.total) + row * a.hidden;
      add_row(x, static_cast<const T*>(a.residual) + row * a.residual_stride, total, a.hidden);
      x = total;
    }
    const float mean = square_sum(x, a.hidden) / static_cast<float>(a.hidden);
    const float factor = 1.0f / __builtin_sqrtf(mean + a.eps);
    scale_row(x, weight, static_cast<T*>(a.out) + row * a.hidden, a.hidden, factor);
  }
}

}  // namespace

void rms_norm(const RmsNorm& args) {
  by_dtype(args.dtype, [&](auto element) { run<decltype(element)>(args); });
}

}  // namespace dsopt::DSOPT_VARIANT
