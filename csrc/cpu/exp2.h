// The exponential.
#pragma once

#include "simd.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

// 2^(x + exponent), relative error below 1e-7. `exponent` is a whole number: it is added to the whole part of x, so
// that a large one costs x no digits. Results below 2^-100 become exactly 0: float32 loses them beside a row's largest
// weight, and their products would be denormal numbers, which cost a hundred cycles each. A NaN stays a NaN.
//
// Without kVanishing the caller knows that the result lies above 2^-100.
template <bool kVanishing = true>
inline Vec exp2(Vec x, float exponent) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
#if defined(__AVX512F__)
  const Vec rounded = (x + kRound) - kRound;
#else
  const Vec sum = x + exponent, shifted = sum + kRound;
  const Vec rounded = (shifted - kRound) - exponent;
#endif
  const Vec fraction = x - rounded;  // in [-0.5, 0.5]
  // The polynomial with p(0) = 1 whose largest relative error is least: 2e-9, and 8e-8 with float32's roundings. One
  // degree less would save one operation of fourteen and double the error.
  Vec p = broadcast(1.5353362e-4f);
  p = p * fraction + 1.33988745e-3f;
  p = p * fraction + 9.61843736e-3f;
  p = p * fraction + 5.55033247e-2f;
  p = p * fraction + 2.40226479e-1f;
  p = p * fraction + 6.93147203e-1f;
  p = p * fraction + 1.0f;
#if defined(__AVX512F__)
  // One instruction multiplies by 2^(rounded + exponent) and clears small results: not-less-than keeps a NaN.
  const __m512 power = (__m512)(rounded + exponent);
  if (!kVanishing) return (Vec)_mm512_scalef_ps((__m512)p, power);
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.0f - exponent), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)p, power);
#else
  const Vec result = p * (Vec)(((IntVec)shifted + 127) << 23);  // the exponent field of the power
  return kVanishing ? select(sum < -100.0f, Vec{}, result) : result;
#endif
}

// 2^x of one number.
inline float exp2(float x) { return exp2<true>(broadcast(x), 0.0f)[0]; }

}  // namespace andromeda::cpu::ANDROMEDA_ISA
