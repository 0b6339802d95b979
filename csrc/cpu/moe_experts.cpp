// Gated MLPs: those each token chose, weighted and summed, and one that all tokens pass.
//
// Choices are sorted by expert, so that the weights of an expert are read once however many tokens chose it.
// First the intermediate activations of all choices, a block of weight rows at a time; then blocks of output
// columns, each summed over the experts in ascending order. One thread owns a block, so the order of every sum
// is fixed by the token alone.
#include <math.h>

#include "dsopt/dtypes.h"
#include "dsopt/kernels.h"
#include "dsopt/math.h"
#include "dsopt/matrix.h"
#include "dsopt/parallel.h"

namespace dsopt::DSOPT_VARIANT {
namespace {

// weight rows that are computed with at once, beside few tokens and beside many: the first matrices' and the last's
template <class W>
constexpr int64_t kFeatures = sizeof(W) == 1 ? 64 : 32;
constexpr int64_t kColumns = 64;
constexpr int64_t kGemmBlock = round_up(32, kGemmRows);
static_assert(kColumns <= kMaxRows && kGemmBlock <= kColumns && kFeatures<Fp8> <= kColumns);
// choices of an MLP from which turning its weights pays, in a call of many tokens
constexpr int64_t kGemmPays = 20;

template <class F>
DSOPT_INLINE Vec map(Vec x, F f) {
  for (int i = 0; i < kLanes; ++i) x[i] = f(x[i]);
  return x;
}

DSOPT_INLINE Vec activate(Vec x, Activation activation) {
  switch (activation) {
    case Activation::silu: return x * sigmoid(x);
    case Activation::swiglu_oai: return x * sigmoid(x * 1.702f);
    case Activation::relu: return x < Vec{} ? Vec{} : x;
    case Activation::relu2: return x < Vec{} ? Vec{} : x * x;
    case Activation::gelu: return map(x, [](float v) { return 0.5f * v * (1.0f + erff(v * 0.70710678f)); });
    case Activation::gelu_tanh:
      return map(x, [](float v) { return 0.5f * v * (1.0f + tanhf(0.79788456f * (v + 0.044715f * v * v * v))); });
  }
  return x;
}

// the MLPs of one expert, and who passes it
struct Unit {
  const Mlps* mlps;
  int64_t index;         // of the MLP in its stack
  int64_t first, count;  // its choices
};

// T: dtype of the input and of biases, W: of the matrices
template <class T, class W>
struct Experts {
  using Element = typename Packing<W>::Element;
  const MoeExperts& a;
  int64_t choices = 0;  // of routed experts; the shared one's follow
  int64_t units = 0;
  int64_t x_width, h_width;
  bool many;             // tokens
  int64_t block;         // features of an item of the first part
  int64_t piece;         // columns that are computed with at once in the second part
  int64_t columns;       // of an item of it
  int64_t shared_blocks = 0, routed_blocks = 0;
  int64_t sums_size, work_size, private_size;  // floats
  int threads;

  Unit* unit;
  int64_t* token;  // [choice]
  float* weight;   // [choice]
  Element* x;      // [token][x_width]
  Element* h;      // [choice][h_width]
  float* private_memory;

  explicit Experts(const MoeExperts& args) : a(args) {
    const int64_t most = a.tokens * a.topk + (a.shared.intermediate ? a.tokens : 0);
    x_width = token_stride<W>(a.hidden);
    h_width = token_stride<W>(max(a.routed.intermediate, a.shared.intermediate));
    threads = team_size(3 * a.hidden * (a.tokens * a.topk * a.routed.intermediate + a.tokens * a.shared.intermediate));

    many = a.tokens >= kGemmLeast;
    block = many ? kGemmBlock : kFeatures<W>;
    piece = many ? kGemmBlock : kColumns;
    // wide items read the activations less often
    columns = many ? 2 * piece : piece;
    sums_size = round_up(a.tokens * columns, 16);
    work_size = max(many ? kGemmPanel : 0, round_up(few_tokens_memory<W>(max(a.hidden, max(a.routed.intermediate, a.shared.intermediate))), 16));
    private_size = sums_size + work_size + 2 * min(most, many ? kGemmMost : kTileTokens) * kColumns;

    const auto bytes = [](int64_t count, int64_t size) { return round_up(count * size, 64); };
    const int64_t units_bytes = bytes(a.num_experts + 1, sizeof(Unit));
    const int64_t token_bytes = bytes(most, sizeof(int64_t)), weight_bytes = bytes(most, sizeof(float));
    const int64_t x_bytes = bytes(a.tokens * x_width, sizeof(Element));
    const int64_t h_bytes = bytes(most * h_width, sizeof(Element));
    const int64_t private_bytes = bytes(private_size, sizeof(float));
    char* at = static_cast<char*>(scratch(static_cast<unsigned long>(
        units_bytes + token_bytes + weight_bytes + x_bytes + h_bytes + threads * private_bytes)));
    const auto take = [&](int64_t size) { return (at += size) - size; };
    unit = reinterpret_cast<Unit*>(take(units_bytes));
    token = reinterpret_cast<int64_t*>(take(token_bytes));
    weight = reinterpret_cast<float*>(take(weight_bytes));
    x = reinterpret_cast<Element*>(take(x_bytes));
    h = reinterpret_cast<Element*>(take(h_bytes));
    private_memory = reinterpret_cast<float*>(at);

    sort();
  }

  int64_t id(int64_t t, int64_t k) const { return a.ids[t * a.ids_stride0 + k * a.ids_stride1]; }

  // the shared expert, then each chosen one with its choices; an id that is no expert's is dropped
  void sort() {
    for (int64_t e = 0; e <= a.num_experts; ++e) unit[e] = {&a.routed, e, 0, 0};
    for (int64_t t = 0; t < a.tokens; ++t) {
      for (int64_t k = 0; k < a.topk; ++k) {
        if (id(t, k) >= 0 && id(t, k) < a.num_experts) ++unit[id(t, k)].count;
      }
    }
    for (int64_t e = 0; e < a.num_experts; ++e) {
      unit[e].first = choices;
      choices += unit[e].count;
      unit[e].count = 0;
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      for (int64_t k = 0; k < a.topk; ++k) {
        if (id(t, k) < 0 || id(t, k) >= a.num_experts) continue;
        Unit& chosen = unit[id(t, k)];
        const int64_t at = chosen.first + chosen.count++;
        token[at] = t;
        weight[at] = a.weights[t * a.weights_stride0 + k * a.weights_stride1];
      }
    }
    for (int64_t e = 0; e < a.num_experts; ++e) {
      if (unit[e].count) unit[units++] = unit[e];
    }
    routed_blocks = (a.routed.intermediate + block - 1) / block;
    if (!a.shared.intermediate) return;
    for (int64_t u = units++; u > 0; --u) unit[u] = unit[u - 1];
    unit[0] = {&a.shared, 0, choices, a.tokens};
    for (int64_t t = 0; t < a.tokens; ++t) token[choices + t] = t, weight[choices + t] = 1.0f;
    shared_blocks = (a.shared.intermediate + block - 1) / block;
  }

  static void add_bias(const Tensor3& bias, int64_t index, int64_t first, int64_t n, float* values) {
    if (!bias.data) return;
    const T* b = static_cast<const T*>(bias.data) + index * bias.stride0 + first * bias.stride1;
    for (int64_t i = 0; i < n; ++i) values[i] += to_float(b[i * bias.stride1]);
  }

  bool has_many(const Unit& u) const { return many && u.count >= kGemmPays; }
  // choices of a unit that are computed with at once
  int64_t at_once(const Unit& u, int64_t left) const { return part(left, has_many(u) ? kGemmMost : kTileTokens); }

  // y[i] = w @ operand(i) for `count` operands and n <= kColumns rows; y[i] are kColumns apart
  template <class F>
  static void product(bool many, const Matrix<W>& w, int64_t n, int64_t k, int64_t count, F operand, float* work,
                      float* y) {
    const Element* operands[kGemmMost];
    for (int64_t i = 0; i < count; ++i) operands[i] = operand(i);
    if (!many) return few_tokens(w, n, operands, count, k, work, y, kColumns);
    for (int64_t r = 0; r < n; r += kGemmRows) {
      many_tokens(w.from(r), min(kGemmRows, n - r), operands, count, k, work, y + r, kColumns);
    }
  }

  // h[choices] of `n` intermediate features from `first` on
  void intermediate(const Unit& u, int64_t first, float* memory) const {
    const Mlps& m = *u.mlps;
    const int64_t n = min(block, m.intermediate - first);
    const Matrix<W> gate = matrix<W>(m.gate, m.gate_scale, u.index).from(first);
    const Matrix<W> up = matrix<W>(m.up, m.up_scale, u.index).from(first);
    float* work = memory + sums_size;
    for (int64_t c = u.first, count; c < u.first + u.count; c += count) {
      count = at_once(u, u.first + u.count - c);
      float *g = work + work_size, *v = g + count * kColumns;
      const auto tokens = [&](int64_t i) { return x + token[c + i] * x_width; };
      product(has_many(u), gate, n, a.hidden, count, tokens, work, g);
      if (m.up.data) product(has_many(u), up, n, a.hidden, count, tokens, work, v);
      for (int64_t i = 0; i < count; ++i, g += kColumns, v += kColumns) {
        add_bias(m.gate_bias, u.index, first, n, g);
        if (m.up.data) add_bias(m.up_bias, u.index, first, n, v);
        activate_block(m, g, v, n);
        Element* to = h + (c + i) * h_width;
        for (int64_t j = 0; j < n; ++j) store(to + Packing<W>::place(first + j), g[j]);
        if (first + n < m.intermediate) continue;
        // what is packed behind the last feature meets weights that are none
        for (int64_t j = first + n; j < packed_width(m.intermediate); ++j) store(to + Packing<W>::place(j), 0.0f);
      }
    }
  }

  // g = act(g) * v for the first n of a block
  static void activate_block(const Mlps& m, float* g, const float* v, int64_t n) {
    for (int64_t j = 0; j < n; j += kLanes) {
      Vec gate = load(g + j), up = load(v + j);
      if (m.up.data) {
        const Vec limit = splat(m.limit);
        gate = gate > limit ? limit : gate;
        up = up > limit ? limit : up < -limit ? -limit : up;
        if (m.activation == Activation::swiglu_oai) up += 1.0f;
        store(g + j, activate(gate, m.activation) * up);
      } else {
        store(g + j, activate(gate, m.activation));
      }
    }
  }

  // out[:, first : first + columns]
  void output(int64_t first, float* memory) const {
    const int64_t n = min(columns, a.out_hidden - first);
    float* acc = memory;
    for (int64_t i = 0; i < a.tokens * columns; ++i) acc[i] = 0.0f;
    for (int64_t i = 0; i < units; ++i) {
      for (int64_t at = 0; at < n; at += piece) add_unit(unit[i], first + at, min(piece, n - at), acc + at, memory);
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      T* out = static_cast<T*>(a.out) + t * a.out_hidden + first;
      const float* sums = acc + t * columns;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(out + i, load(sums + i));
      if (i < n) store_some(out + i, load(sums + i), n - i);
    }
  }

  // adds what a unit gives to n <= kColumns columns from `first` on
  void add_unit(const Unit& u, int64_t first, int64_t n, float* acc, float* memory) const {
    const Mlps& m = *u.mlps;
    const Matrix<W> down = matrix<W>(m.down, m.down_scale, u.index).from(first);
    float* work = memory + sums_size;
    for (int64_t c = u.first, count; c < u.first + u.count; c += count) {
      count = at_once(u, u.first + u.count - c);
      float* y = work + work_size;
      const auto hidden = [&](int64_t i) { return h + (c + i) * h_width; };
      product(has_many(u), down, n, m.intermediate, count, hidden, work, y);
      for (int64_t i = 0; i < count; ++i, y += kColumns) {
        add_bias(m.down_bias, u.index, first, n, y);
        float* to = acc + token[c + i] * columns;
        const Vec w = splat(weight[c + i]);
        for (int64_t j = 0; j < n; j += kLanes) store(to + j, madd(load(y + j), w, load(to + j)));
      }
    }
  }

  void run() const {
    const int64_t shared_units = shared_blocks ? 1 : 0;
    Phase packing{a.tokens};
    Phase features{shared_blocks + (units - shared_units) * routed_blocks};
    Phase outputs{(a.out_hidden + columns - 1) / columns};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      packing.run([&](int64_t t) { pack<T, W>(static_cast<const T*>(a.x) + t * a.x_stride, a.hidden, x + t * x_width); });
      packing.wait();
      float* memory = private_memory + thread_index() * round_up(private_size, 16);
      features.run([&](int64_t i) {
        if (i < shared_blocks) return intermediate(unit[0], i * block, memory);
        i -= shared_blocks;
        intermediate(unit[shared_units + i / routed_blocks], i % routed_blocks * block, memory);
      });
      features.wait();
      outputs.run([&](int64_t i) { output(i * columns, memory); });
    }
  }
};

}  // namespace

void moe_experts(const MoeExperts& args) {
  by_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.fp8 ? Experts<T, Fp8>(args).run() : Experts<T, T>(args).run();
  });
}

}  // namespace dsopt::DSOPT_VARIANT
