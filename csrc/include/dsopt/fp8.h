// Weights in e4m3: widened exactly, subnormals and NaN included, by byte shuffles.
//
// The bfloat16 of a code has its sign and the upper bits of its exponent in the high byte, which the code's upper four
// bits decide, and the code's lower four bits on top of the low byte. Only exponent 0, where the value is a
// subnormal, needs other bytes; tables of 16 entries give what differs.
#pragma once

#include "dsopt/simd.h"

namespace dsopt::DSOPT_VARIANT {

struct Fp8 {
  uint8_t bits;
};

// weights that are widened at once
constexpr int kFp8Step = 4 * kLanes;

DSOPT_INLINE float to_float(Fp8 x) {
  const uint32_t magnitude = x.bits & 0x7fu, sign = uint32_t{x.bits} << 24 & 0x80000000u;
  const uint32_t bits = sign | (magnitude == 0x7f ? 0x7ff00000u : (magnitude << 20) + (120u << 23));
  float f = 0;
  __builtin_memcpy(&f, &bits, sizeof f);
  // with exponent 0 the leading 1 of that is not there
  if (magnitude < 8) f = 2 * f - (sign ? -0x1p-6f : 0x1p-6f);
  return magnitude == 0 && sign ? -0.0f : f;
}

// v[0], v[1]: the even and the odd ones of 2 * kLanes weights at p; v[2], v[3]: of the 2 * kLanes behind them
#if defined(__AVX512F__) || defined(__AVX2__)
// by the upper four bits: the high byte, and what is added to a code to look up the difference with. From 0x80 on there
// is none; NaN comes out as 0, whose difference, that of the code 0, makes it one.
#define DSOPT_HIGH 0x3c, 0x3d, 0x3e, 0x3f, 0x40, 0x41, 0x42, 0x43, -68, -67, -66, -65, -64, -63, -62, -61
#define DSOPT_WHERE 0, -128, -128, -128, -128, -128, -128, -127, -128, 0, 0, 0, 0, 0, 0, 1
// by the lower four bits beside exponents 0 and 1: the difference in the high and in the low byte
#define DSOPT_HIGH_DIFFERENCE 0x3c, 0x07, 0x07, 0x07, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
#define DSOPT_LOW_DIFFERENCE 0x00, 0x10, -96, -16, 0x40, 0x70, 0x20, 0x10, 0, 0, 0, 0, 0, 0, 0, 0
#if defined(__AVX512VBMI__)
// the high or the low byte of the bfloat16 of every code without its sign
struct Fp8Table {
  alignas(64) uint8_t bytes[128];
  constexpr explicit Fp8Table(bool high) : bytes{} {
    for (int code = 0; code < 128; ++code) {
      int exponent = code >> 3, fraction = code & 7;
      if (exponent == 0 && fraction != 0) {
        for (exponent = 1; fraction < 8; fraction <<= 1) --exponent;
        fraction &= 7;
      }
      const int bits = code == 0 ? 0 : code == 127 ? 0x7ff0 : (exponent + 120) << 7 | fraction << 4;
      bytes[code] = static_cast<uint8_t>(high ? bits >> 8 : bits);
    }
  }
};
constexpr Fp8Table kFp8High{true}, kFp8Low{false};

// the low and the high bytes of the bfloat16s of codes
DSOPT_INLINE void look_up(__m512i x, __m512i& low, __m512i& high) {
  const auto bytes = [x](const Fp8Table& t) __attribute__((always_inline)) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(t.bytes), x, _mm512_load_si512(t.bytes + 64));
  };
  constexpr int or_and = 0xea;  // of (a & b) | c
  low = bytes(kFp8Low);
  high = _mm512_ternarylogic_epi32(x, _mm512_set1_epi8(-128), bytes(kFp8High), or_and);
}
#elif defined(__AVX512F__)
DSOPT_INLINE void look_up(__m512i x, __m512i& low, __m512i& high) {
  const auto table = [](__m128i t) __attribute__((always_inline)) { return _mm512_maskz_broadcast_i32x4(0xffff, t); };
  const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(0x0f));
  const __m512i at = _mm512_add_epi8(x, _mm512_shuffle_epi8(table(_mm_setr_epi8(DSOPT_WHERE)), upper));
  const __m512i high_difference = _mm512_shuffle_epi8(table(_mm_setr_epi8(DSOPT_HIGH_DIFFERENCE)), at);
  const __m512i low_difference = _mm512_shuffle_epi8(table(_mm_setr_epi8(DSOPT_LOW_DIFFERENCE)), at);
  constexpr int and_xor = 0x78;  // of a ^ (b & c)
  high = _mm512_xor_si512(_mm512_shuffle_epi8(table(_mm_setr_epi8(DSOPT_HIGH)), upper), high_difference);
  low = _mm512_ternarylogic_epi32(low_difference, _mm512_slli_epi16(x, 4), _mm512_set1_epi8(-16), and_xor);
}
#else
DSOPT_INLINE void widen(const Fp8* p, Vec (&v)[4]) {
  const auto table = [](__m128i t) __attribute__((always_inline)) { return _mm256_broadcastsi128_si256(t); };
  const __m256i x = _mm256_permute4x64_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), 0xd8);
  const __m256i mask = _mm256_set1_epi8(0x0f);
  const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(x, 4), mask);
  const __m256i at = _mm256_add_epi8(x, _mm256_shuffle_epi8(table(_mm_setr_epi8(DSOPT_WHERE)), upper));
  const __m256i high_difference = _mm256_shuffle_epi8(table(_mm_setr_epi8(DSOPT_HIGH_DIFFERENCE)), at);
  const __m256i low_difference = _mm256_shuffle_epi8(table(_mm_setr_epi8(DSOPT_LOW_DIFFERENCE)), at);
  const __m256i high = _mm256_xor_si256(_mm256_shuffle_epi8(table(_mm_setr_epi8(DSOPT_HIGH)), upper), high_difference);
  const __m256i lower = _mm256_xor_si256(_mm256_slli_epi16(_mm256_and_si256(x, mask), 4), low_difference);
  const VecU a = (VecU)_mm256_unpacklo_epi8(lower, high), b = (VecU)_mm256_unpackhi_epi8(lower, high);
  v[0] = (Vec)(a << 16), v[1] = (Vec)(a & 0xffff0000u);
  v[2] = (Vec)(b << 16), v[3] = (Vec)(b & 0xffff0000u);
}
#endif
#if defined(__AVX512F__)
DSOPT_INLINE void widen(const Fp8* p, Vec (&v)[4]) {
  // unpacking interleaves the halves of each 16 bytes: what belongs there is brought there first
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i low, high;
  look_up(_mm512_maskz_permutexvar_epi64(0xff, order, _mm512_loadu_si512(p)), low, high);
  const VecU a = (VecU)_mm512_unpacklo_epi8(low, high), b = (VecU)_mm512_unpackhi_epi8(low, high);
  v[0] = (Vec)(a << 16), v[1] = (Vec)(a & 0xffff0000u);
  v[2] = (Vec)(b << 16), v[3] = (Vec)(b & 0xffff0000u);
}

// v[i] = byte i of every four in x, widened
DSOPT_INLINE void widen_fours(__m512i x, Vec (&v)[4]) {
  __m512i low, high;
  look_up(x, low, high);
  const __m512i upper = _mm512_set1_epi16(-256);
  constexpr int choose = 0xca;  // a ? b : c
  const VecU even = (VecU)_mm512_ternarylogic_epi32(upper, _mm512_slli_epi16(high, 8), low, choose);
  const VecU odd = (VecU)_mm512_ternarylogic_epi32(upper, high, _mm512_srli_epi16(low, 8), choose);
  v[0] = (Vec)(even << 16), v[1] = (Vec)(odd << 16);
  v[2] = (Vec)(even & 0xffff0000u), v[3] = (Vec)(odd & 0xffff0000u);
}
#endif
#undef DSOPT_HIGH
#undef DSOPT_WHERE
#undef DSOPT_HIGH_DIFFERENCE
#undef DSOPT_LOW_DIFFERENCE
#else
DSOPT_INLINE void widen(const Fp8* p, Vec (&v)[4]) {
  for (int i = 0; i < kFp8Step; ++i) v[i / (2 * kLanes) * 2 + i % 2][i % (2 * kLanes) / 2] = to_float(p[i]);
}
#endif

}  // namespace dsopt::DSOPT_VARIANT
