// Linear layers that share their input: one sweep over the rows of all weights.
#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/matrix.h"
#include "dsopt/parallel.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

// weight rows of an item of work
constexpr int64_t kBlock = 64;

// T: dtype of the input, W: of the weights, Out: of the results
template <class T, class W, class Out>
struct Linears {
  using Element = typename Packing<W>::Element;
  const MultiLinear& a;
  const int64_t width;
  const bool many;  // tokens
  const int64_t block;
  int64_t blocks = 0, rows = 0;  // of all weights
  int threads;
  Element* x;  // [token][width]
  float* private_memory;
  int64_t work_size, private_size;  // floats

  explicit Linears(const MultiLinear& args)
      : a(args),
        width(token_stride<W>(args.in_features)),
        many(args.tokens >= kGemmLeast),
        block(many ? kGemmRows : kBlock) {
    for (int64_t i = 0; i < a.count; ++i) {
      rows += a.weights[i].out_features;
      blocks += (a.weights[i].out_features + block - 1) / block;
    }
    threads = team_size(a.tokens * a.in_features * rows);
    const int64_t x_bytes = round_up(a.tokens * width * static_cast<int64_t>(sizeof(Element)), 64);
    work_size = many ? kGemmPanel : round_up(few_tokens_memory<W>(a.in_features), 16);
    private_size = work_size + min(a.tokens, many ? kGemmMost : kTileTokens) * kBlock;
    char* memory = static_cast<char*>(scratch(static_cast<unsigned long>(
        x_bytes + threads * private_size * static_cast<int64_t>(sizeof(float)))));
    x = reinterpret_cast<Element*>(memory);
    private_memory = reinterpret_cast<float*>(memory + x_bytes);
  }

  // out[:, first : first + n] of one weight
  void some_rows(const MultiLinear::Weight& w, int64_t first, float* memory) const {
    const int64_t n = min(block, w.out_features - first);
    const Matrix<W> weights = matrix<W>({w.data, 0, w.stride}, w.scale, 0).from(first);
    float* y = memory + work_size;
    for (int64_t t = 0, count; t < a.tokens; t += count) {
      count = part(a.tokens - t, many ? kGemmMost : kTileTokens);
      const Element* tokens[kGemmMost];
      for (int64_t i = 0; i < count; ++i) tokens[i] = x + (t + i) * width;
      (many ? many_tokens<W> : few_tokens<W>)(weights, n, tokens, count, a.in_features, memory, y, kBlock);
      for (int64_t i = 0; i < count; ++i) write(w, t + i, first, n, y + i * kBlock);
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
      packing.run([&](int64_t t) { pack<T, W>(static_cast<const T*>(a.x) + t * a.x_stride, a.in_features, x + t * width); });
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

template <class T, class W>
void run(const MultiLinear& args) {
  args.out_dtype == args.dtype ? Linears<T, W, T>(args).run() : Linears<T, W, float>(args).run();
}

}  // namespace

void multi_linear(const MultiLinear& args) {
  by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.fp8 ? run<T, Fp8>(args) : run<T, T>(args);
  });
}

}  // namespace dsopt::DSOPT_VARIANT
