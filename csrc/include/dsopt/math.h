// Functions of vectors beyond arithmetic.
#pragma once

#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {

// 1 / (1 + e^-x); NaN stays NaN
DSOPT_INLINE Vec sigmoid(Vec x) {
  const Vec e = exp_nonpositive(x < Vec{} ? x : -x);
  return (x < Vec{} ? e : splat(1.0f)) / (e + 1.0f);
}

}  // namespace dsopt::DSOPT_VARIANT
