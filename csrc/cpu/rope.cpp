// Rotary embedding: pairs of each row turned by the angles of its position.
#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/parallel.h"
#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

// (a, b) -> (a cos - b sin, b cos + a sin); a pair's elements lie `apart` from one another, pairs `next`
template <bool DENSE, class T, class C>
DSOPT_INLINE void turn(const Rope& r, const T* x, const C* cos, const C* sin, T* out) {
  const int64_t half = r.sizes[3] / 2, second = r.full_tables ? half : 0;
  const int64_t in_next = r.interleaved_in ? 2 : 1, in_apart = r.interleaved_in ? 1 : half;
  const int64_t out_next = r.interleaved_out ? 2 : 1, out_apart = r.interleaved_out ? 1 : half;
  const int64_t c = DENSE ? 1 : r.cos_next, s = DENSE ? 1 : r.sin_next;
  for (int64_t i = 0; i < half; ++i) {
    const float a = to_float(x[i * in_next]), b = to_float(x[i * in_next + in_apart]);
    store(out + i * out_next, a * to_float(cos[i * c]) - b * to_float(sin[i * s]));
    store(out + i * out_next + out_apart, b * to_float(cos[(second + i) * c]) + a * to_float(sin[(second + i) * s]));
  }
}

template <class T, class C>
void run(const Rope& r) {
  const int64_t rows = r.sizes[0] * r.sizes[1] * r.sizes[2];
  const int threads = team_size(rows * r.sizes[3] * 4);
  const bool dense = r.cos_next == 1 && r.sin_next == 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at[3] = {row / (r.sizes[1] * r.sizes[2]), row / r.sizes[2] % r.sizes[1], row % r.sizes[2]};
    const auto offset = [&](const int64_t* strides) {
      return at[0] * strides[0] + at[1] * strides[1] + at[2] * strides[2];
    };
    const T* const x = static_cast<const T*>(r.x) + offset(r.x_strides);
    const C* const cos = static_cast<const C*>(r.cos) + offset(r.cos_strides);
    const C* const sin = static_cast<const C*>(r.sin) + offset(r.sin_strides);
    T* const out = static_cast<T*>(r.out) + row * r.sizes[3];
    dense ? turn<true>(r, x, cos, sin, out) : turn<false>(r, x, cos, sin, out);
  }
}

}  // namespace

void rope(const Rope& args) {
  by_dtype(args.dtype, [&](auto element) {
    by_dtype(args.table_dtype, [&](auto entry) { run<decltype(element), decltype(entry)>(args); });
  });
}

}  // namespace dsopt::DSOPT_VARIANT
