// dsopt._cpu: native kernels on addresses, sizes and strides; the Python side checks the tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "dsopt/kernels.h"
#include "dsopt/runtime.h"

namespace py = pybind11;
using namespace dsopt;

namespace {

const void* pointer(uintptr_t address) { return reinterpret_cast<const void*>(address); }
void* writable(uintptr_t address) { return reinterpret_cast<void*>(address); }

// a tensor as Python gives it: address, strides of all dimensions
using Stack3 = std::pair<uintptr_t, std::array<int64_t, 3>>;
using Stack4 = std::pair<uintptr_t, std::array<int64_t, 4>>;

Tensor3 tensor(const Stack3& t) { return {pointer(t.first), t.second[0], t.second[1]}; }
Tensor4 tensor(const Stack4& t) { return {pointer(t.first), t.second[0], t.second[1], t.second[2]}; }

void register_isa(py::module_& m) {
  m.def("isas", &isa_names, "Instruction sets this processor can run, least first.");
  m.def("isa", [] { return isa_name(active_isa()); }, "The instruction set in use.");
  m.def("set_isa", &set_isa, py::arg("name") = "",
        "Use this instruction set; an empty name means DSOPT_ISA, or the best one. ValueError if it is not there.");
}

void register_rms_norm(py::module_& m) {
  m.def(
      "rms_norm",
      [](uintptr_t x, uintptr_t residual, uintptr_t weight, uintptr_t out, uintptr_t total, int64_t rows,
         int64_t hidden, int64_t x_stride, int64_t residual_stride, float eps, bool bfloat16) {
        const RmsNorm args{pointer(x), pointer(residual), pointer(weight), writable(out), writable(total), rows,
                           hidden, x_stride, residual_stride, eps, bfloat16 ? Dtype::bfloat16 : Dtype::float32};
        active_isa();
        py::gil_scoped_release nogil;
        rms_norm(args);
      },
      "RMS norm of rows x hidden elements; residual, weight and total may be 0.");
}

void register_mla_attention(py::module_& m) {
  py::enum_<Mask>(m, "Mask")
      .value("none", Mask::none)
      .value("boolean", Mask::boolean)
      .value("float32", Mask::float32)
      .value("bfloat16", Mask::bfloat16);
  m.def(
      "mla_attention",
      [](const std::array<int64_t, 8>& sizes, const Stack4& q_nope, const Stack4& q_rope, const Stack3& latent,
         const Stack3& k_rope, const Stack3& w_uk, const Stack3& w_uv, const Stack3& mask, Mask mask_kind,
         float hidden, uintptr_t out, float scale, bool causal, bool bfloat16) {
        const auto [batch, heads, tokens, cached, rank, nope, rope, value] = sizes;
        const MlaAttention args{batch, heads, tokens, cached, rank, nope, rope, value,
                                tensor(q_nope), tensor(q_rope), tensor(latent), tensor(k_rope), tensor(w_uk),
                                tensor(w_uv), tensor(mask), writable(out), scale, hidden, mask_kind,
                                bfloat16 ? Dtype::bfloat16 : Dtype::float32, causal};
        active_isa();
        py::gil_scoped_release nogil;
        mla_attention(args);
        trim_scratch();
      },
      "Absorbed latent attention. sizes: batch, heads, tokens, cached, rank, nope, rope, value.");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  register_isa(m);
  register_rms_norm(m);
  register_mla_attention(m);
}
