// Barriers of one warpgroup of a block. Consumer g of at most three has barrier 1 + g: __syncthreads() is 0, and an id that
// is no constant would reserve all 16.
#pragma once

#include <cstdint>
#include <type_traits>

#include "hopper/wgmma.cuh"

namespace andromeda::cuda::hopper {

// Calls function(std::integral_constant<int, id>) with the id of the barrier of consumer `group` of kGroups.
template <int kGroups, typename Function>
__device__ inline void with_barrier_of(int group, const Function& function) {
  static_assert(kGroups == 2 || kGroups == 3);
  if (group == 0) {
    function(std::integral_constant<int, 1>{});
  } else if (kGroups == 2 || group == 1) {
    function(std::integral_constant<int, 2>{});
  } else {
    function(std::integral_constant<int, 3>{});
  }
}

// Waits for all threads of a warpgroup, and returns whether `predicate` is true in any of them.
template <int kGroups>
__device__ inline bool any_of_warpgroup(int group, bool predicate) {
  int result;
  with_barrier_of<kGroups>(group, [&](auto barrier) {
    asm volatile(
        "{\n"
        ".reg .pred own, any;\n"
        "setp.ne.b32 own, %1, 0;\n"
        "barrier.cta.red.or.pred any, %2, %3, own;\n"
        "selp.b32 %0, 1, 0, any;\n"
        "}\n"
        : "=r"(result)
        : "r"(static_cast<int>(predicate)), "n"(decltype(barrier)::value), "n"(kWarpgroupThreads)
        : "memory");
  });
  return result != 0;
}

template <int kGroups>
__device__ inline void synchronize_warpgroup(int group) {
  with_barrier_of<kGroups>(group, [](auto barrier) {
    asm volatile("barrier.cta.sync %0, %1;\n" ::"n"(decltype(barrier)::value), "n"(kWarpgroupThreads) : "memory");
  });
}

}  // namespace andromeda::cuda::hopper
