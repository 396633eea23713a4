// Reductions over groups of adjacent lanes of a warp.
#pragma once

namespace andromeda::cuda {

inline constexpr int kWarpLanes = 32;
inline constexpr unsigned kWholeWarp = 0xffffffffu;

// Replaces each value by its sum over the lane's group of 2^group_log2 lanes, the same bits in all of them. Every lane
// of the warp takes part. Several values at once hide the latency of the shuffles.
template <int kCount>
__device__ inline void sum_over_group(float (&values)[kCount], int group_log2) {
  for (int offset = (1 << group_log2) >> 1; offset > 0; offset >>= 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kWholeWarp, values[i], offset);
  }
}

// The same over the whole warp.
template <int kCount>
__device__ inline void sum_over_warp(float (&values)[kCount]) {
#pragma unroll
  for (int offset = kWarpLanes / 2; offset > 0; offset >>= 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] += __shfl_xor_sync(kWholeWarp, values[i], offset);
  }
}

}  // namespace andromeda::cuda
