// Linear layers that share their input: one sweep over the rows of all weights.
#include "dsopt/dots.h"
#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/parallel.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

// weight rows of an item of work
constexpr int64_t kBlock = 64;

// T: dtype of the operands, Out: of the results
template <class T, class Out>
struct Linears {
  using Element = typename Packing<T>::Element;
  const MultiLinear& a;
  const int64_t width;
  Element* x;  // [token][width]

  explicit Linears(const MultiLinear& args) : a(args), width(packed_width(args.in_features)) {
    x = static_cast<Element*>(scratch(static_cast<unsigned long>(a.tokens * width) * sizeof(Element)));
  }

  // out[:, first : first + n] of one weight
  void block(const MultiLinear::Weight& w, int64_t first) const {
    const int64_t n = min(kBlock, w.out_features - first);
    const Rows<T> rows{static_cast<const T*>(w.data) + first * w.stride, w.stride};
    const T* bias = w.bias ? static_cast<const T*>(w.bias) + first : nullptr;
    for (int64_t t = 0; t < a.tokens; t += kTileTokens) {
      const int64_t count = min(kTileTokens, a.tokens - t);
      const Element* tokens[kTileTokens];
      for (int64_t i = 0; i < count; ++i) tokens[i] = x + (t + i) * width;
      float y[kTileTokens][kBlock];
      dot_rows(rows, n, tokens, count, a.in_features, &y[0][0], kBlock);
      for (int64_t i = 0; i < count; ++i) {
        Out* out = static_cast<Out*>(w.out) + (t + i) * w.out_features + first;
        int64_t j = 0;
        for (; j + kLanes <= n; j += kLanes) {
          store(out + j, bias ? load(y[i] + j) + load(bias + j) : load(y[i] + j));
        }
        if (j < n) {
          const Vec v = load_some(y[i] + j, n - j);
          store_some(out + j, bias ? v + load_some(bias + j, n - j) : v, n - j);
        }
      }
    }
  }

  void run() const {
    int64_t blocks = 0, rows = 0;
    for (int64_t i = 0; i < a.count; ++i) {
      rows += a.weights[i].out_features;
      blocks += (a.weights[i].out_features + kBlock - 1) / kBlock;
    }
    const int threads = team_size(a.tokens * a.in_features * rows);
    Phase packing{a.tokens};
    Phase products{blocks};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      packing.run([&](int64_t t) { pack(static_cast<const T*>(a.x) + t * a.x_stride, a.in_features, x + t * width); });
      packing.wait();
      products.run([&](int64_t i) {
        const MultiLinear::Weight* w = a.weights;
        for (int64_t n; i >= (n = (w->out_features + kBlock - 1) / kBlock); ++w) i -= n;
        block(*w, i * kBlock);
      });
    }
  }
};

}  // namespace

void multi_linear(const MultiLinear& args) {
  by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.out_dtype == args.dtype ? Linears<T, T>(args).run() : Linears<T, float>(args).run();
  });
}

}  // namespace dsopt::DSOPT_VARIANT
