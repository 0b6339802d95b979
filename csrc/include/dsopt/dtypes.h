// From a dtype that is known at run time to code for its element.
#pragma once

#include "dsopt/kernels.h"
#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {

// f(element) with a zero of the dtype's type: f says decltype(element)
template <class F>
DSOPT_INLINE void by_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::bfloat16: return f(Bf16{});
    case Dtype::float16: return f(Fp16{});
  }
}

}  // namespace dsopt::DSOPT_VARIANT
