// Copies of tiles by TMA (PTX ISA, "cp.async.bulk.tensor"; sm_90). The host describes a tensor by a tensor map
// (tensor_map.h), one thread orders the copy of a box, and an mbarrier counts the bytes that have arrived.
//
// A box is one panel of a tile (attention/tile.cuh): 64 channels of some rows of one head, with the swizzle of that
// file. Rows and channels outside of the tensor become zero, and their bytes are counted too.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/tile.cuh"

namespace andromeda::cuda::hopper {

__device__ inline void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(map) : "memory");
}

// One panel, from channel `channel` and row `row` on.
__device__ inline void copy_box(std::uint32_t target, const CUtensorMap* map, std::uint32_t barrier, int channel,
                                int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];\n" ::"r"(target),
      "l"(map), "r"(barrier), "r"(channel), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// Rows `row` ... row + kRows - 1 of a head: kTileBytes<kRows, kHeadDim> bytes, to be announced with arrive_expect().
template <int kRows, int kHeadDim>
__device__ inline void copy_tile(std::uint32_t tile, const CUtensorMap* map, std::uint32_t barrier, int row, int head,
                                 int batch) {
#pragma unroll
  for (int panel = 0; panel < kHeadDim / kPanelWidth; ++panel) {
    copy_box(tile + panel * (kRows * kPanelRowBytes), map, barrier, panel * kPanelWidth, row, head, batch);
  }
}

// A run of bytes: address and size are multiples of 16.
__device__ inline void copy_bytes(std::uint32_t target, const void* source, int bytes, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(target),
      "l"(__cvta_generic_to_global(source)), "r"(bytes), "r"(barrier)
      : "memory");
}

}  // namespace andromeda::cuda::hopper
