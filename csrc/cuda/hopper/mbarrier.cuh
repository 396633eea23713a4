// mbarriers: how the warps of a block and the copies of TMA wait for each other (PTX ISA, "mbarrier"; sm_90).
//
// An mbarrier counts arrivals and bytes. Its phase ends when all arrivals that it was made for have come, and all bytes
// that were announced have been copied; then the next phase begins. A waiting thread names the parity of the phase whose
// end it wants to see: 0 for the first, 1 for the second, 0 for the third. The wait for the phase *before* the first
// one, parity 1, returns at once: so a producer may fill each buffer once before anybody has released it.
//
//   producer   wait(empty, !parity)   expect(full, bytes), copies that complete at `full`
//   consumer   wait(full, parity)     reads the buffer, arrive(empty)
#pragma once

#include <cstdint>

namespace andromeda::cuda::hopper {

inline constexpr int kMbarrierBytes = 8;

// By one thread, before any other uses the barrier: fence_mbarrier_init() and a barrier of the block come between.
__device__ inline void init_mbarrier(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

__device__ inline void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives, and announces `bytes` of copies that belong to the phase.
__device__ inline void arrive_expect(std::uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits for the end of a phase of this parity. Everything that was written before the arrivals, by threads or copies,
// may be read afterwards.
__device__ inline void wait(std::uint32_t barrier, std::uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A place in a ring of kStages buffers, and the parity of the phase in which it is filled.
template <int kStages>
struct RingPlace {
  int stage = 0;
  std::uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Between ordinary accesses of this thread to shared memory and accesses by TMA or wgmma that come after them.
__device__ inline void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

}  // namespace andromeda::cuda::hopper
