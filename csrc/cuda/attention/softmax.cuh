// The softmax of the attention kernels.
//
// Scores are kept in units of <q, k>: the bias is divided by softmax_scale, and 2^(score * softmax_scale_log2) with
// softmax_scale_log2 = softmax_scale * log2(e) is the weight. log-sum-exps inside a kernel are in base 2.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

namespace andromeda::cuda {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// Bounded softmax takes 2^(score * softmax_scale_log2) as it is. The numbers a row may sum are then between 2^-126 and 2^126 in
// bfloat16 and float32 (docs/attention.md#bounded-softmax). float16 is normal from 2^-14 on: a row whose own key has
// the smallest weight, e^-7 = 2^-10, keeps its neighbours, which a bias makes smaller still, to 4 bits less than the
// own key.
template <typename T>
inline constexpr float kMaxBound = std::is_same_v<T, __half> ? 7.0f : 40.0f;

// A row without a visible key so far has no maximum: any finite one serves, its weights are 0.
__device__ inline float finite_max(float maximum) { return maximum == -__int_as_float(0x7f800000) ? 0.0f : maximum; }

}  // namespace andromeda::cuda
