// Linear layers that share their input: one sweep over the rows of all weights.
#include "dsopt/dtypes.h"
#include "dsopt/gemm.h"
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
  const bool many;  // tokens
  const int64_t block;
  int64_t blocks = 0, rows = 0;  // of all weights
  int threads;
  Element* x;  // [token][width]
  float* private_memory;
  int64_t private_size = 0;  // floats

  explicit Linears(const MultiLinear& args)
      : a(args),
        width(token_stride<T>(args.in_features)),
        many(args.tokens >= kGemmLeast),
        block(many ? kGemmRows : kBlock) {
    for (int64_t i = 0; i < a.count; ++i) {
      rows += a.weights[i].out_features;
      blocks += (a.weights[i].out_features + block - 1) / block;
    }
    threads = team_size(a.tokens * a.in_features * rows);
    const int64_t x_bytes = round_up(a.tokens * width * static_cast<int64_t>(sizeof(Element)), 64);
    if (many) private_size = kGemmPanel + min(a.tokens, kGemmMost) * kGemmRows;
    char* memory = static_cast<char*>(scratch(static_cast<unsigned long>(
        x_bytes + threads * private_size * static_cast<int64_t>(sizeof(float)))));
    x = reinterpret_cast<Element*>(memory);
    private_memory = reinterpret_cast<float*>(memory + x_bytes);
  }

  // out[:, first : first + n] of one weight
  void some_rows(const MultiLinear::Weight& w, int64_t first, float* memory) const {
    const int64_t n = min(block, w.out_features - first);
    const Rows<T> weights{static_cast<const T*>(w.data) + first * w.stride, w.stride};
    const int64_t most = many ? kGemmMost : kTileTokens;
    for (int64_t t = 0; t < a.tokens;) {
      const int64_t count = part(a.tokens - t, most);
      const Element* tokens[kGemmMost];
      for (int64_t i = 0; i < count; ++i) tokens[i] = x + (t + i) * width;
      float few[kTileTokens * kBlock];
      float* y = many ? memory + kGemmPanel : few;
      if (many) {
        gemm_rows(weights, n, tokens, count, a.in_features, memory, y, block);
      } else {
        dot_rows(weights, n, tokens, count, a.in_features, y, block);
      }
      for (int64_t i = 0; i < count; ++i) write(w, t + i, first, n, y + i * block);
      t += count;
    }
  }

  void write(const MultiLinear::Weight& w, int64_t t, int64_t first, int64_t n, const float* y) const {
    const T* bias = w.bias ? static_cast<const T*>(w.bias) + first : nullptr;
    Out* out = static_cast<Out*>(w.out) + t * w.out_features + first;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) store(out + j, bias ? load(y + j) + load(bias + j) : load(y + j));
    if (j < n) {
      const Vec v = load_some(y + j, n - j);
      store_some(out + j, bias ? v + load_some(bias + j, n - j) : v, n - j);
    }
  }

  void run() const {
    Phase packing{a.tokens};
    Phase products{blocks};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      packing.run([&](int64_t t) { pack(static_cast<const T*>(a.x) + t * a.x_stride, a.in_features, x + t * width); });
      packing.wait();
      float* memory = private_memory + thread_index() * private_size;
      products.run([&](int64_t i) {
        const MultiLinear::Weight* w = a.weights;
        for (int64_t n; i >= (n = (w->out_features + block - 1) / block); ++w) i -= n;
        some_rows(*w, i * block, memory);
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
