// Clusters: blocks that run at the same time on neighbouring multiprocessors, and read each other's shared memory (PTX
// ISA, "shared::cluster"; sm_90).
#pragma once

#include <cstdint>

namespace andromeda::cuda::hopper {

// The barrier of the cluster, in two halves: everything that its threads wrote to shared memory before they arrived may
// be read after the wait. A block must not exit before the others have read its shared memory.
__device__ inline void arrive_at_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
__device__ inline void wait_for_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }

// The address in the shared memory of block `rank` of what this block has at `address`.
__device__ inline std::uint32_t map_to_block(std::uint32_t address, int rank) {
  std::uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}

// Read from an address of map_to_block(), if it exists; else the values stay.
__device__ inline void ld_cluster16(float4& values, std::uint32_t address, bool exists) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.b32 exists, %5, 0;\n"
      "@exists ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+f"(values.x), "+f"(values.y), "+f"(values.z), "+f"(values.w)
      : "r"(address), "r"(static_cast<int>(exists))
      : "memory");
}

__device__ inline void ld_cluster8(float& first, float& second, std::uint32_t address, bool exists) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.b32 exists, %3, 0;\n"
      "@exists ld.shared::cluster.v2.f32 {%0, %1}, [%2];\n"
      "}\n"
      : "+f"(first), "+f"(second)
      : "r"(address), "r"(static_cast<int>(exists))
      : "memory");
}

}  // namespace andromeda::cuda::hopper
