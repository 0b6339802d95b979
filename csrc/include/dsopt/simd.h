// Vectors of floats as wide as the instruction set at hand, in the compiler's own vector types.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#ifndef DSOPT_VARIANT
#error "compile kernel sources with -DDSOPT_VARIANT=<instruction set>"
#endif

#define DSOPT_INLINE inline __attribute__((always_inline))
// arrays of vectors stay in registers only if every loop over them is unrolled before optimisation
#if defined(__clang__)
#define DSOPT_UNROLL _Pragma("unroll")
#else
#define DSOPT_UNROLL _Pragma("GCC unroll 16")
#endif

namespace dsopt::DSOPT_VARIANT {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t VecI __attribute__((vector_size(4 * kLanes)));
typedef uint32_t VecU __attribute__((vector_size(4 * kLanes)));
typedef uint16_t VecH __attribute__((vector_size(2 * kLanes)));

struct Bf16 {
  uint16_t bits;
};

struct Fp16 {
  uint16_t bits;
};

constexpr float kInfinity = __builtin_inff();

// not Vec{} + x, which would be computed: it turns -0 into 0
DSOPT_INLINE Vec splat(float x) {
#if defined(__AVX512F__)
  return Vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#elif defined(__AVX2__)
  return Vec{x, x, x, x, x, x, x, x};
#else
  return Vec{x, x, x, x};
#endif
}

// b where one of them is NaN
DSOPT_INLINE Vec max(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_maskz_max_ps(0xffff, a, b);  // without the mask GCC 12 warns of its own header
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}
DSOPT_INLINE float max(float a, float b) { return a > b ? a : b; }
DSOPT_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
DSOPT_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// a * b + c. Compiled with -ffp-contract=off and this in every place where it counts: left to itself the
// compiler picks which of two products is fused, and may pick differently in two copies of one function.
DSOPT_INLINE Vec madd(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// loads and stores: any address, one dtype in memory, float32 in registers
DSOPT_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

DSOPT_INLINE Vec load(const Bf16* p) {
  // spelled out because GCC widens a converted vector in halves
#if defined(__AVX512F__)
  const VecU wide = (VecU)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  const VecU wide = (VecU)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  const VecU wide = __builtin_convertvector(h, VecU);
#endif
  return (Vec)(wide << 16);
}

DSOPT_INLINE Vec load(const Fp16* p) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  VecH h;
  __builtin_memcpy(&h, p, sizeof h);
  const VecU bits = __builtin_convertvector(h, VecU);
  const VecU low = (bits & 0x7fff) << 13;
  const VecU normal = low + (112u << 23), special = low | (0xffu << 23);
  // 2^-14 + the fraction, less 2^-14: no subnormal is computed with, which a mode of the processor could drop
  const VecU subnormal = (VecU)((Vec)(low + (113u << 23)) - 0x1p-14f);
  const VecU magnitude = low < (1u << 23) ? subnormal : low >= (31u << 23) ? special : normal;
  return (Vec)(magnitude | (bits & 0x8000) << 16);
#endif
}

DSOPT_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// round to nearest even; a NaN becomes the quiet NaN 0x7fff
DSOPT_INLINE void store(Bf16* p, Vec v) {
  const VecU bits = (VecU)v;
  const VecU rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const VecU nan = VecU{} + 0x7fff;
  const VecH h = __builtin_convertvector(v == v ? rounded : nan, VecH);
  __builtin_memcpy(p, &h, sizeof h);
}

// round to nearest even, to infinity beyond 65504; a NaN becomes a quiet one
DSOPT_INLINE void store(Fp16* p, Vec v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  const __m128i h = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecU bits = (VecU)v, magnitude = bits & 0x7fffffff;
  const VecU normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // beside 0.5 the last bit of a float32 is worth 2^-24, as the last bit of a subnormal float16
  const VecU subnormal = (VecU)((Vec)magnitude + 0.5f) - (126u << 23);
  const VecU infinity = VecU{} + 0x7c00, nan = VecU{} + 0x7e00;
  const VecU special = magnitude > (0xffu << 23) ? nan : infinity;
  const VecU half = magnitude < (113u << 23) ? subnormal : magnitude >= (143u << 23) ? special : normal;
  const VecH h = __builtin_convertvector(half | (bits >> 16 & 0x8000), VecH);
#endif
  __builtin_memcpy(p, &h, sizeof h);
}

DSOPT_INLINE void store(float* p, float x) { *p = x; }

DSOPT_INLINE void store(Bf16* p, float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  p->bits = x == x ? static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : uint16_t{0x7fff};
}

DSOPT_INLINE float to_float(float x) { return x; }

DSOPT_INLINE float to_float(Bf16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

DSOPT_INLINE float to_float(Fp16 x) {
#if defined(__AVX2__)
  return _cvtsh_ss(x.bits);
#else
  const Fp16 lanes[kLanes] = {x};
  return load(lanes)[0];
#endif
}

DSOPT_INLINE void store(Fp16* p, float x) {
#if defined(__AVX2__)
  p->bits = _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  Fp16 lanes[kLanes];
  store(lanes, splat(x));
  *p = lanes[0];
#endif
}

// the first n < kLanes elements at p, zeros behind them
template <class T>
DSOPT_INLINE Vec load_some(const T* p, int64_t n) {
  T part[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}

template <class T>
DSOPT_INLINE void store_some(T* p, Vec v, int64_t n) {
  T part[kLanes];
  store(part, v);
  for (int64_t i = 0; i < n; ++i) p[i] = part[i];
}

// [a0, a2, ..., b0, b2, ...] and [a1, a3, ..., b1, b3, ...]
#if defined(__clang__)
#define DSOPT_PICK(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DSOPT_PICK(...) __builtin_shuffle(a, b, VecI{__VA_ARGS__})
#endif
DSOPT_INLINE Vec evens(Vec a, Vec b) {
#if defined(__AVX512F__)
  return DSOPT_PICK(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  return DSOPT_PICK(0, 2, 4, 6, 8, 10, 12, 14);
#else
  return DSOPT_PICK(0, 2, 4, 6);
#endif
}
DSOPT_INLINE Vec odds(Vec a, Vec b) {
#if defined(__AVX512F__)
  return DSOPT_PICK(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif defined(__AVX2__)
  return DSOPT_PICK(1, 3, 5, 7, 9, 11, 13, 15);
#else
  return DSOPT_PICK(1, 3, 5, 7);
#endif
}
#undef DSOPT_PICK

// [a0+a1, a2+a3, ..., b0+b1, b2+b3, ...], and the larger of each pair
DSOPT_INLINE Vec add_pairs(Vec a, Vec b) { return evens(a, b) + odds(a, b); }
DSOPT_INLINE Vec max_pairs(Vec a, Vec b) { return max(evens(a, b), odds(a, b)); }

DSOPT_INLINE float max(Vec v) {
  for (int n = kLanes; n > 1; n /= 2) v = max_pairs(v, v);
  return v[0];
}

DSOPT_INLINE float sum(Vec v) {
  for (int n = kLanes; n > 1; n /= 2) v = add_pairs(v, v);
  return v[0];
}


// e^x for x <= 0, within 2 units in the last place; 0 below -87; NaN stays NaN
DSOPT_INLINE Vec exp_nonpositive(Vec x) {
  const Vec low = splat(-87.0f);
  const Vec y = max(low, x);
  // adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits: e^y = 2^n e^r, |r| <= ln(2) / 2
  const Vec shifted = madd(y, splat(1.44269504f), splat(12582912.0f));
  const Vec n = shifted - 12582912.0f;
  const Vec r = madd(n, splat(2.12194440e-4f), madd(n, splat(-0.693359375f), y));
  Vec p = splat(1.0f / 5040);
  p = madd(p, r, splat(1.0f / 720));
  p = madd(p, r, splat(1.0f / 120));
  p = madd(p, r, splat(1.0f / 24));
  p = madd(p, r, splat(1.0f / 6));
  p = madd(p, r, splat(0.5f));
  p = madd(p, r, splat(1.0f));
  p = madd(p, r, splat(1.0f));
  const Vec power = (Vec)(((VecI)shifted << 23) + 0x3f800000);
  return x < low ? Vec{} : p * power;
}

}  // namespace dsopt::DSOPT_VARIANT
