// 1 / sqrt(x), as accurate as the result of a norm needs.
#pragma once

#include <cfloat>

namespace andromeda::cuda {

// For x > 0. rsqrtf is within 2 ulp, which is plenty for rows of half precision; for float32 a step of Newton's method
// brings it to 1 ulp. An infinite x gives 0, which the step would turn into NaN.
template <typename T>
__device__ inline float inverse_sqrt(float x) {
  const float estimate = rsqrtf(x);
  if (sizeof(T) < sizeof(float) || !(x <= FLT_MAX)) return estimate;
  return fmaf(0.5f * estimate, fmaf(-x * estimate, estimate, 1.0f), estimate);
}

}  // namespace andromeda::cuda
