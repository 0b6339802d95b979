// dsopt._cpu: native kernels on addresses, sizes and strides; the Python side checks the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>

#include "dsopt/kernels.h"
#include "dsopt/program.h"
#include "dsopt/runtime.h"

namespace py = pybind11;
using namespace dsopt;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* writable(uintptr_t address) { return reinterpret_cast<void*>(address); }

// What a kernel needs before it runs without the interpreter: an instruction set, or the exception that says why not,
// and torch's number of threads, which OpenMP learns in each thread when torch first looks at it there.
void prepare() {
  thread_local bool prepared = false;
  active_isa();
  if (prepared) return;
  const py::dict modules = py::module_::import("sys").attr("modules");
  if (modules.contains("torch")) py::object(modules["torch"]).attr("get_num_threads")();
  prepared = true;
}

// a tensor as Python gives it: address, strides of all dimensions
using Stack3 = std::pair<uintptr_t, std::array<int64_t, 3>>;
using Stack4 = std::pair<uintptr_t, std::array<int64_t, 4>>;

Tensor3 tensor(const Stack3& t) { return {pointer(t.first), t.second[0], t.second[1]}; }
Tensor4 tensor(const Stack4& t) { return {pointer(t.first), t.second[0], t.second[1], t.second[2]}; }

// address or 0, strides of matrices and of rows of blocks, rows and columns of a block, whether they are exponents
using PyScales = std::array<int64_t, 6>;

Scales scales(const PyScales& s) {
  return {pointer(static_cast<uintptr_t>(s[0])), s[1], s[2], s[3], s[4], s[5] != 0};
}

// Makes a call of a kernel, and keeps it if a program is being recorded.
template <class Call>
void launch(const Call& call) {
  prepare();
  if (Program* program = Program::recording()) program->add(call);
  py::gil_scoped_release nogil;
  call();
  trim_scratch();
}

void register_program(py::module_& m) {
  py::class_<Program>(m, "Program",
                      "Kernel calls made on this thread inside `with program:`, which program() makes again.\n\n"
                      "The calls keep addresses only: whoever makes them again answers for the memory behind.")
      .def(py::init<>())
      .def("__enter__", [](Program& p) { p.begin(); }, "RuntimeError if this thread is recording another one.")
      .def("__exit__", [](Program& p, const py::args&) { p.end(); })
      .def("__len__", &Program::size)
      .def("extend", &Program::extend, "Appends another program's calls.")
      .def("__call__", [](const Program& p) {
        prepare();
        py::gil_scoped_release nogil;
        p.run();
      });
}

void register_isa(py::module_& m) {
  m.def("isas", &isa_names, "Instruction sets this processor can run, least first.");
  m.def("isa", [] { return isa_name(active_isa()); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name") = "",
        "Use this instruction set; an empty name means DSOPT_ISA, or the best one. ValueError if it is not there.");
}

void register_dtypes(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype")
      .value("float32", Dtype::float32)
      .value("bfloat16", Dtype::bfloat16)
      .value("float16", Dtype::float16);
}

void register_rms_norm(py::module_& m) {
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t total, int64_t rows,
         int64_t hidden, int64_t x_stride, int64_t residual_stride, float eps, Dtype dtype) {
        const RmsNorm args{pointer(x), pointer(residual), pointer(weight), writable(out), writable(total), rows,
                           hidden, x_stride, residual_stride, eps, dtype};
        launch([args] { rms_norm(args); });
      },
      "RMS norm of rows x hidden elements; residual, weight and total may be 0.");
}

void register_mla_attention(py::module_& m) {
  py::enum_<Mask>(m, "Mask")
      .value("none", Mask::none)
      .value("boolean", Mask::boolean)
      .value("float32", Mask::float32)
      .value("bfloat16", Mask::bfloat16);
  const auto define = [&](const char* name, void (*kernel)(const MlaAttention&), const char* doc) {
    m.def(
        name,
        [kernel](const std::array<int64_t, 8>& sizes, const Stack4& q_nope, const Stack4& q_rope, const Stack3& latent,
                 const Stack3& k_rope, const Stack3& w_uk, const Stack3& w_uv, const Stack3& mask, Mask mask_kind,
                 float hidden, uintptr_t out, float scale, bool causal, Dtype dtype,
                 const std::array<PyScales, 3>& scale_of) {
          const auto [batch, heads, tokens, cached, rank, nope, rope, value] = sizes;
          const MlaAttention args{batch, heads, tokens, cached, rank, nope, rope, value,
                                  tensor(q_nope), tensor(q_rope), tensor(latent), tensor(k_rope), tensor(w_uk),
                                  tensor(w_uv), tensor(mask), writable(out), scale, hidden, mask_kind,
                                  dtype, causal, scales(scale_of[0]), scales(scale_of[1]), scales(scale_of[2])};
          launch([kernel, args] { kernel(args); });
        },
        doc);
  };
  define("mla_attention", &mla_attention,
         "Absorbed latent attention. sizes: batch, heads, tokens, cached, rank, nope, rope, value.");
  define("mla_prefill", &mla_prefill, "Expanded latent attention; arguments as of mla_attention.");
}

void register_attention(py::module_& m) {
  const auto define = [&](const char* name, void (*kernel)(const GroupedAttention&), const char* doc) {
    m.def(
        name,
        [kernel](const std::array<int64_t, 8>& sizes, const Stack4& q, const Stack4& k, const Stack4& v,
                 const Stack4& mask, Mask mask_kind, float hidden, uintptr_t sinks, uintptr_t out, float scale,
                 bool causal, Dtype dtype) {
          const auto [batch, heads, kv_heads, tokens, cached, width, value, mask_heads] = sizes;
          const GroupedAttention args{batch, heads, kv_heads, tokens, cached, width, value,
                                      tensor(q), tensor(k), tensor(v), tensor(mask), mask_heads,
                                      static_cast<const float*>(pointer(sinks)), writable(out), scale, hidden,
                                      mask_kind, dtype, causal};
          launch([kernel, args] { kernel(args); });
        },
        doc);
  };
  define("attention", &attention,
         "Attention. sizes: batch, heads, kv_heads, tokens, cached, width, value, mask_heads; sinks may be 0.");
  define("attention_prefill", &attention_prefill, "Attention of many tokens; arguments as of attention.");
}

// address, stride of the first and of the second dimension
using Stack = std::array<int64_t, 3>;

Tensor3 tensor(const Stack& t) { return {pointer(static_cast<uintptr_t>(t[0])), t[1], t[2]}; }

// gate, up, down, their biases; scales of the first three; rows of gate
using PyMlps = std::tuple<std::array<Stack, 6>, std::array<PyScales, 3>, int64_t, Activation, float>;

Mlps mlps(const PyMlps& m) {
  const auto& [t, s, intermediate, activation, limit] = m;
  return {tensor(t[0]), tensor(t[1]), tensor(t[2]), tensor(t[3]), tensor(t[4]), tensor(t[5]),
          scales(s[0]), scales(s[1]), scales(s[2]), intermediate, activation, limit};
}

void register_moe_experts(py::module_& m) {
  py::enum_<Activation>(m, "Activation")
      .value("silu", Activation::silu)
      .value("gelu", Activation::gelu)
      .value("gelu_tanh", Activation::gelu_tanh)
      .value("relu", Activation::relu)
      .value("relu2", Activation::relu2)
      .value("swiglu_oai", Activation::swiglu_oai);
  m.def(
      "moe_experts",
      [](const std::array<int64_t, 5>& sizes, uintptr_t x, int64_t x_stride, const Stack& ids, const Stack& weights,
         const PyMlps& routed, const PyMlps& shared, uintptr_t out, Dtype dtype, bool fp8) {
        const auto [tokens, hidden, out_hidden, topk, num_experts] = sizes;
        const MoeExperts args{tokens, hidden, out_hidden, topk, num_experts, pointer(x), x_stride,
                              static_cast<const int64_t*>(tensor(ids).data), ids[1], ids[2],
                              static_cast<const float*>(tensor(weights).data), weights[1], weights[2], mlps(routed),
                              mlps(shared), writable(out), dtype, fp8};
        launch([args] { moe_experts(args); });
      },
      "Experts and a shared MLP. sizes: tokens, hidden, out_hidden, topk, num_experts.");
}

void register_multi_linear(py::module_& m) {
  m.def(
      "multi_linear",
      [](uintptr_t x, int64_t x_stride, int64_t tokens, int64_t in_features,
         const std::vector<std::pair<std::array<int64_t, 5>, PyScales>>& weights, Dtype dtype, Dtype out_dtype,
         bool fp8) {
        std::vector<MultiLinear::Weight> all;
        all.reserve(weights.size());
        for (const auto& [weight, scale] : weights) {
          const auto [data, stride, out_features, bias, out] = weight;
          all.push_back({pointer(static_cast<uintptr_t>(data)), stride, out_features,
                         pointer(static_cast<uintptr_t>(bias)), writable(static_cast<uintptr_t>(out)), scales(scale)});
        }
        const MultiLinear args{tokens, in_features, static_cast<int64_t>(all.size()), pointer(x), x_stride, nullptr,
                               dtype, out_dtype, fp8};
        launch([args, all = std::move(all)] {
          MultiLinear call = args;
          call.weights = all.data();
          multi_linear(call);
        });
      },
      "Linear layers of one input. weights: (address, row stride, out_features, bias or 0, out) and scales of each.");
}

void register_moe_route(py::module_& m) {
  py::enum_<Scoring>(m, "Scoring")
      .value("softmax", Scoring::softmax)
      .value("sigmoid", Scoring::sigmoid)
      .value("sqrtsoftplus", Scoring::sqrtsoftplus);
  m.def(
      "moe_route",
      [](uintptr_t logits, int64_t stride, uintptr_t bias, uintptr_t weights, uintptr_t ids,
         const std::array<int64_t, 5>& sizes, float outside, float eps, float scale, Scoring scoring, bool top2,
         bool renormalize, Dtype dtype) {
        const auto [tokens, num_experts, topk, num_groups, topk_groups] = sizes;
        const MoeRoute args{pointer(logits), stride, static_cast<const float*>(pointer(bias)),
                            static_cast<float*>(writable(weights)), static_cast<int64_t*>(writable(ids)), tokens,
                            num_experts, topk, num_groups, topk_groups, outside, eps, scale, scoring, top2,
                            renormalize, dtype};
        launch([args] { moe_route(args); });
      },
      "Choice of experts. sizes: tokens, num_experts, topk, num_groups, topk_groups.");
}

void register_rope(py::module_& m) {
  m.def(
      "rope",
      [](const std::array<int64_t, 4>& sizes, const Stack3& x, const Stack4& cos, const Stack4& sin, uintptr_t out,
         bool interleaved_in, bool interleaved_out, bool full_tables, Dtype dtype, Dtype table_dtype) {
        Rope args{};
        std::copy(sizes.begin(), sizes.end(), args.sizes);
        args.x = pointer(x.first), args.cos = pointer(cos.first), args.sin = pointer(sin.first);
        std::copy(x.second.begin(), x.second.end(), args.x_strides);
        std::copy_n(cos.second.begin(), 3, args.cos_strides), args.cos_next = cos.second[3];
        std::copy_n(sin.second.begin(), 3, args.sin_strides), args.sin_next = sin.second[3];
        args.out = writable(out);
        args.interleaved_in = interleaved_in, args.interleaved_out = interleaved_out;
        args.full_tables = full_tables;
        args.dtype = dtype;
        args.table_dtype = table_dtype;
        launch([args] { rope(args); });
      },
      "Rotary embedding. sizes: three outer dimensions and the width; x: address and outer strides; cos, sin: address and strides.");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  register_isa(m);
  register_program(m);
  register_dtypes(m);
  register_rms_norm(m);
  register_mla_attention(m);
  register_attention(m);
  register_moe_experts(m);
  register_multi_linear(m);
  register_moe_route(m);
  register_rope(m);
}
