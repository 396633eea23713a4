// 1 / sqrt(x) as accurate as the results of a norm need it.
#pragma once

#include <cfloat>

namespace andromeda::cuda {

// For x > 0. rsqrtf is within 2 ulp, plenty for rows of half precision; a step of Newton's method brings it to 1 ulp
// for float32. An infinite x gives 0, and the step would make that NaN.
template <typename T>
__device__ inline float inverse_sqrt(float x) {
  const float estimate = rsqrtf(x);
  if (sizeof(T) < sizeof(float) || !(x <= FLT_MAX)) return estimate;
  return fmaf(0.5f * estimate, fmaf(-x * estimate, estimate, 1.0f), estimate);
}

}  // namespace andromeda::cuda
