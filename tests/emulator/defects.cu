// Tiny kernels with one defect each, for test_emulator.py: with kDefect the emulator must report it, without kDefect it
// must report nothing. One block of 64 threads and 64 floats of input and output, unless the test says otherwise.
#include <cstdint>

#define DEFECT(name)      \
  template <bool kDefect> \
  __global__ void name(float* out, const float* in)
#define BOTH(name)                                           \
  template __global__ void name<true>(float*, const float*); \
  template __global__ void name<false>(float*, const float*)

__device__ inline std::uint32_t shared_address(const volatile void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(const_cast<const void*>(pointer)));
}

// ---- races in shared memory

DEFECT(read_before_write) {
  __shared__ float row[64];
  row[threadIdx.x] = in[threadIdx.x];
  if (!kDefect) __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}
BOTH(read_before_write);

DEFECT(write_after_read) {
  __shared__ float row[64];
  row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const float other = row[63 - threadIdx.x];
  if (!kDefect) __syncthreads();
  row[threadIdx.x] = other + 1;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}
BOTH(write_after_read);

DEFECT(write_after_write) {
  __shared__ float cell;
  if (threadIdx.x == 0) cell = 1;
  if (!kDefect) __syncthreads();
  if (threadIdx.x == 32) cell = 2;
  __syncthreads();
  out[threadIdx.x] = cell;
}
BOTH(write_after_write);

// Lanes of one warp run together here, but nothing orders them.
DEFECT(no_warp_barrier) {
  __shared__ float row[64];
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  row[threadIdx.x] = in[threadIdx.x];
  if (!kDefect) __syncwarp();
  out[threadIdx.x] = row[first + (lane ^ 1)];
}
BOTH(no_warp_barrier);

// A shuffle exchanges registers and orders no memory.
DEFECT(shuffle_is_no_barrier) {
  __shared__ float row[64];
  const int lane = threadIdx.x % 32, first = threadIdx.x - lane;
  row[threadIdx.x] = in[threadIdx.x];
  const float other = __shfl_xor_sync(0xffffffff, in[threadIdx.x], 1);
  if (!kDefect) __syncwarp();
  out[threadIdx.x] = row[first + (lane ^ 1)] + other;
}
BOTH(shuffle_is_no_barrier);

// The same value twice is no race.
DEFECT(different_values) {
  __shared__ float cell;
  cell = kDefect ? in[threadIdx.x] : 3.0f;
  __syncthreads();
  out[threadIdx.x] = cell;
}
BOTH(different_values);

DEFECT(never_written) {
  __shared__ float row[64];
  if (!kDefect || threadIdx.x != 5) row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}
BOTH(never_written);

// ---- cp.async

__device__ inline void copy_async(void* target, const float* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(target)), "l"(source) : "memory");
}
__device__ inline void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
__device__ inline void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

DEFECT(copy_not_awaited) {
  __shared__ float row[64];
  copy_async(&row[threadIdx.x], &in[threadIdx.x]);
  commit();
  wait_for_all_but<kDefect ? 1 : 0>();
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
  wait_for_all_but<0>();
}
BOTH(copy_not_awaited);

// A thread waits for its own copies: those of others need a barrier after the wait.
DEFECT(copy_of_another_thread) {
  __shared__ float row[64];
  copy_async(&row[threadIdx.x], &in[threadIdx.x]);
  commit();
  wait_for_all_but<0>();
  if (!kDefect) __syncthreads();
  out[threadIdx.x] = row[63 - threadIdx.x];
}
BOTH(copy_of_another_thread);

DEFECT(write_over_copy) {
  __shared__ float row[64];
  copy_async(&row[threadIdx.x], &in[threadIdx.x]);
  commit();
  if (!kDefect) wait_for_all_but<0>();
  row[threadIdx.x] = 1;
  wait_for_all_but<0>();
  out[threadIdx.x] = row[threadIdx.x];
}
BOTH(write_over_copy);

DEFECT(exit_with_copy) {
  __shared__ float row[64];
  copy_async(&row[threadIdx.x], &in[threadIdx.x]);
  commit();
  if (!kDefect) wait_for_all_but<0>();
}
BOTH(exit_with_copy);

// ---- addresses

DEFECT(read_outside) { out[threadIdx.x] = in[threadIdx.x + (kDefect ? 1 : 0)]; }
BOTH(read_outside);

DEFECT(write_outside) { out[static_cast<int>(threadIdx.x) - (kDefect ? 1 : 0)] = 1; }
BOTH(write_outside);

DEFECT(shared_outside) {
  __shared__ float row[64];
  row[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const int column = static_cast<int>(row[0] * 0) + threadIdx.x;
  out[threadIdx.x] = *(volatile float*)(row + column + (kDefect ? 64 : 0));
}
BOTH(shared_outside);

DEFECT(misaligned) {
  const char* bytes = reinterpret_cast<const char*>(in) + (kDefect ? 8 : 16);
  const float4 four = *reinterpret_cast<const float4*>(bytes);
  out[threadIdx.x] = four.x + four.y + four.z + four.w;
}
BOTH(misaligned);

DEFECT(write_to_input) {
  float* target = kDefect ? const_cast<float*>(in) : out;
  target[threadIdx.x] = 1;
}
BOTH(write_to_input);

// ---- barriers

DEFECT(half_a_warp) {
  if (!kDefect || threadIdx.x % 32 < 16) asm volatile("bar.sync 1, 64;" ::: "memory");
  out[threadIdx.x] = 1;
}
BOTH(half_a_warp);

DEFECT(counts_differ) {
  if (threadIdx.x < 32) {
    asm volatile("bar.sync 1, 64;" ::: "memory");
  } else {
    asm volatile("bar.sync 1, %0;" ::"r"(kDefect ? 32 : 64) : "memory");
  }
  out[threadIdx.x] = 1;
}
BOTH(counts_differ);

DEFECT(nobody_comes) {
  if (threadIdx.x < 32 || !kDefect) asm volatile("bar.sync 1, 64;" ::: "memory");
  out[threadIdx.x] = 1;
}
BOTH(nobody_comes);

DEFECT(exit_before_barrier) {
  if (kDefect && threadIdx.x < 32) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
BOTH(exit_before_barrier);

DEFECT(shuffle_from_outside) {
  float value = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    const int from = threadIdx.x % 16 ^ 1;
    asm volatile("shfl.sync.idx.b32 %0, %0, %1, 31, %2;" : "+f"(value) : "r"(kDefect ? from + 16 : from), "n"(0xffff));
  }
  out[threadIdx.x] = value;
}
BOTH(shuffle_from_outside);

// ---- between blocks: two of them

DEFECT(same_word) { out[threadIdx.x + (kDefect ? 0 : 64 * blockIdx.x)] = threadIdx.x + 1000 * blockIdx.x; }
BOTH(same_word);

__device__ unsigned semaphore;

enum class Fence { kNone, kByAll, kByOne, kByAllBehindTheBarrier };

// The last block sums the results of all blocks, read by loads or by copies. The thread that increments the semaphore
// needs a fence on either side of it: one after a barrier and before it, one after it and before a barrier.
template <Fence kRelease, Fence kAcquire, bool kBarrier = true, bool kByCopy = false>
__device__ void sum_of_blocks(float* out, const float* in) {
  __shared__ bool last;
  __shared__ float row[64];
  out[64 + blockIdx.x * 64 + threadIdx.x] = in[threadIdx.x];
  if (kRelease == Fence::kByAll) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    if (kRelease == Fence::kByOne) __threadfence();
    last = atomicInc(&semaphore, gridDim.x - 1) == gridDim.x - 1;
    if (kAcquire == Fence::kByOne) __threadfence();
  }
  if (kBarrier) __syncthreads();
  if (kBarrier ? !last : blockIdx.x != 1) return;
  if (kAcquire == Fence::kByAllBehindTheBarrier) __threadfence();
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) {
    const float* part = &out[64 + block * 64 + threadIdx.x];
    if (kByCopy) {
      copy_async(&row[threadIdx.x], part);
      commit();
      wait_for_all_but<0>();
      sum += row[threadIdx.x];
    } else {
      sum += *(const volatile float*)part;
    }
  }
  out[threadIdx.x] = sum;
}

DEFECT(ticket_without_fence) { sum_of_blocks<kDefect ? Fence::kNone : Fence::kByOne, Fence::kByOne>(out, in); }
BOTH(ticket_without_fence);

// Each thread fences its own writes; no thread both fences and increments the semaphore.
DEFECT(ticket_fenced_by_others) { sum_of_blocks<kDefect ? Fence::kByAll : Fence::kByOne, Fence::kByOne>(out, in); }
BOTH(ticket_fenced_by_others);

DEFECT(ticket_without_barrier) { sum_of_blocks<Fence::kByOne, Fence::kByOne, !kDefect>(out, in); }
BOTH(ticket_without_barrier);

// The fence before the semaphore orders writes; reads after the semaphore may still happen early.
DEFECT(ticket_without_second_fence) { sum_of_blocks<Fence::kByOne, kDefect ? Fence::kNone : Fence::kByOne>(out, in); }
BOTH(ticket_without_second_fence);

// The thread that incremented the semaphore acquires with its fence, for itself; no barrier extends that to the others.
DEFECT(ticket_fenced_behind_the_barrier) {
  sum_of_blocks<Fence::kByOne, kDefect ? Fence::kByAllBehindTheBarrier : Fence::kByOne>(out, in);
}
BOTH(ticket_fenced_behind_the_barrier);

// Copies read global memory by the same rule as loads.
DEFECT(ticket_then_copies) {
  sum_of_blocks<Fence::kByOne, kDefect ? Fence::kNone : Fence::kByOne, true, true>(out, in);
}
BOTH(ticket_then_copies);

__device__ unsigned flag, done, word;

__device__ inline unsigned load_relaxed(unsigned* word) {
  unsigned value;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline unsigned load_acquire(unsigned* word) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
  return value;
}
__device__ inline void store_relaxed(unsigned* word, unsigned value) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}
__device__ inline void store_release(unsigned* word, unsigned value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// A block waits for a flag of another one: relaxed operations with a fence of the same thread on either side. It clears
// the flag for the next launch.
DEFECT(flag_without_fence) {
  if (blockIdx.x == 0) {
    out[64 + threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x != 0) return;
    if (!kDefect) __threadfence();
    store_relaxed(&flag, 1);
    return;
  }
  if (threadIdx.x == 0) {
    while (load_relaxed(&flag) == 0) {
    }
    __threadfence();
    store_relaxed(&flag, 0);
  }
  __syncthreads();
  out[threadIdx.x] = *(volatile float*)&out[64 + threadIdx.x];
}
BOTH(flag_without_fence);

// The whole block waits in a loop with barriers. A volatile load finds the flag and acquires nothing.
DEFECT(flag_without_acquire) {
  __shared__ unsigned found;
  if (blockIdx.x == 0) {
    out[64 + threadIdx.x] = in[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) store_release(&flag, 1);
    return;
  }
  do {
    __syncthreads();
    if (threadIdx.x == 0) found = kDefect ? *(volatile unsigned*)&flag : load_acquire(&flag);
    __syncthreads();
  } while (found == 0);
  out[threadIdx.x] = *(volatile float*)&out[64 + threadIdx.x];
  if (threadIdx.x == 0) store_relaxed(&flag, 0);
}
BOTH(flag_without_acquire);

DEFECT(flag_that_nobody_sets) {
  if (threadIdx.x == 0 && blockIdx.x == 1) {
    while (load_acquire(&flag) == 0) {
    }
    store_relaxed(&flag, 0);
  }
  if (threadIdx.x == 0 && blockIdx.x == 0 && !kDefect) store_release(&flag, 1);
  out[64 * blockIdx.x + threadIdx.x] = 1;
}
BOTH(flag_that_nobody_sets);

// Each block in turn adds to what the one before it wrote, and passes the turn on.
DEFECT(turn_without_release) {
  if (threadIdx.x == 0) {
    while (load_acquire(&done) != blockIdx.x) {
    }
  }
  __syncthreads();
  out[threadIdx.x] = (blockIdx.x == 0 ? 0.0f : *(volatile float*)&out[threadIdx.x]) + in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x != 0) return;
  const unsigned next = (blockIdx.x + 1) % gridDim.x;
  if (kDefect) {
    store_relaxed(&done, next);
  } else {
    store_release(&done, next);
  }
}
BOTH(turn_without_release);

// Block 1 overwrites what block 0 reads, when block 0 says so.
DEFECT(overwritten_too_early) {
  __shared__ volatile float row[64];
  if (blockIdx.x == 0) {
    row[threadIdx.x] = *(volatile float*)&out[threadIdx.x];
    if (!kDefect) __syncthreads();
    if (threadIdx.x == 0) store_release(&flag, 1);
    return;
  }
  if (threadIdx.x == 0) {
    while (load_acquire(&flag) == 0) {
    }
    store_relaxed(&flag, 0);
  }
  __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
BOTH(overwritten_too_early);

// Block 2 reads what block 0 wrote, and knows of it through block 1.
DEFECT(chain_without_fence) {
  if (threadIdx.x != 0) return;
  if (blockIdx.x == 0) {
    out[0] = in[0];
    store_release(&flag, 1);
  } else if (blockIdx.x == 1) {
    while (load_relaxed(&flag) == 0) {
    }
    if (!kDefect) __threadfence();
    store_relaxed(&flag, 0);
    store_release(&done, 1);
  } else {
    while (load_acquire(&done) == 0) {
    }
    store_relaxed(&done, 0);
    out[1] = *(volatile float*)&out[0];
  }
}
BOTH(chain_without_fence);

// Patterns without a fence: the operations themselves release and acquire. A release counts for its own word alone.
DEFECT(release_of_another_word) {
  __shared__ bool last;
  out[64 + blockIdx.x * 64 + threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned count;
    if (kDefect) {
      store_release(&word, 1);
      asm volatile("atom.acquire.gpu.global.inc.u32 %0, [%1], %2;"
                   : "=r"(count)
                   : "l"(&done), "r"(gridDim.x - 1)
                   : "memory");
    } else {
      asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                   : "=r"(count)
                   : "l"(&done), "r"(gridDim.x - 1)
                   : "memory");
    }
    last = count == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += *(volatile float*)&out[64 + block * 64 + threadIdx.x];
  out[threadIdx.x] = sum;
}
BOTH(release_of_another_word);

// ---- Hopper
#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

__device__ inline void init_mbarrier(std::uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ inline void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void arrive(std::uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
__device__ inline void expect(std::uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ inline void wait(std::uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra AGAIN;\n}" ::
          "r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
__device__ inline void bulk_load(void* target, const void* source, int bytes, std::uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(target)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
__device__ inline void bulk_store(void* target, const void* source, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target), "r"(shared_address(source)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// All lanes store, one of them arrives: it releases only its own stores.
DEFECT(one_lane_arrives) {
  __shared__ float row[32];
  __shared__ std::uint64_t barrier;
  if (threadIdx.x == 0) init_mbarrier(&barrier, 1);
  __syncthreads();
  if (threadIdx.x < 32) {
    row[threadIdx.x] = in[threadIdx.x];
    if (!kDefect) __syncwarp();
    if (threadIdx.x == 0) arrive(&barrier);
  } else {
    wait(&barrier, 0);
    out[threadIdx.x] = row[63 - threadIdx.x];
  }
}
BOTH(one_lane_arrives);

// The phase waits for bytes; its one arrival has happened.
DEFECT(too_many_arrivals) {
  __shared__ alignas(128) float row[64];
  __shared__ std::uint64_t barrier;
  if (threadIdx.x == 0) {
    init_mbarrier(&barrier, 1);
    fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    expect(&barrier, 256);
    if (kDefect) arrive(&barrier);
    bulk_load(row, in, 256, &barrier);
  }
  wait(&barrier, 0);
  out[threadIdx.x] = row[threadIdx.x];
}
BOTH(too_many_arrivals);

DEFECT(init_not_ordered) {
  __shared__ std::uint64_t barrier;
  if (threadIdx.x == 0) init_mbarrier(&barrier, 64);
  if (!kDefect) __syncthreads();
  arrive(&barrier);
  wait(&barrier, 0);
  out[threadIdx.x] = 1;
}
BOTH(init_not_ordered);

// One bulk copy in and one out, with everything that they need.
template <bool kFenceInit, bool kExpectAll, bool kWaitForLoad, bool kFenceStore, bool kWaitForStore, bool kOneLane>
__device__ void bulk_round_trip(float* out, const float* in) {
  __shared__ alignas(128) float row[64];
  __shared__ std::uint64_t barrier;
  if (threadIdx.x == 0) {
    init_mbarrier(&barrier, 1);
    if (kFenceInit) fence_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) expect(&barrier, kExpectAll ? 256 : 272);
  if (threadIdx.x == 0 || (!kOneLane && threadIdx.x == 1)) bulk_load(row, in, kOneLane ? 256 : 128, &barrier);
  if (kWaitForLoad) wait(&barrier, 0);
  row[threadIdx.x] += 1;
  if (kFenceStore) fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, row, 256);
    if (kWaitForStore) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
    row[0] = 0;
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  if (!kWaitForLoad) wait(&barrier, 0);
}

DEFECT(init_not_fenced) { bulk_round_trip<!kDefect, true, true, true, true, true>(out, in); }
BOTH(init_not_fenced);
DEFECT(bytes_missing) { bulk_round_trip<true, !kDefect, true, true, true, true>(out, in); }
BOTH(bytes_missing);
DEFECT(load_not_awaited) { bulk_round_trip<true, true, !kDefect, true, true, true>(out, in); }
BOTH(load_not_awaited);
DEFECT(store_not_fenced) { bulk_round_trip<true, true, true, !kDefect, true, true>(out, in); }
BOTH(store_not_fenced);
DEFECT(store_not_awaited) { bulk_round_trip<true, true, true, true, !kDefect, true>(out, in); }
BOTH(store_not_awaited);
DEFECT(two_lanes_issue) { bulk_round_trip<true, true, true, true, true, !kDefect>(out, in); }
BOTH(two_lanes_issue);

DEFECT(exit_with_bulk_store) {
  __shared__ alignas(128) float row[64];
  row[threadIdx.x] = in[threadIdx.x];
  fence_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    bulk_store(out, row, 256);
    if (!kDefect) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
}
BOTH(exit_with_bulk_store);

// ---- wgmma: 128 threads; D = A B with A (64, 16) and B (16, 8) without swizzle.

__device__ inline std::uint64_t descriptor(const void* tile, int leading, int stride) {
  const auto field = [](std::uint64_t value) { return (value & 0x3ffff) >> 4; };
  return field(shared_address(tile)) | field(leading) << 16 | field(stride) << 32;
}

enum Flaw {
  kNone,
  kNoFence,
  kNoProxyFence,
  kNoWait,
  kThreeWarps,
  kOtherDescriptor,
  kChangedA,
  kChangedB,
  kReusedA,
  kReusedAfterBarrier,
  kOutside,
  kSeededLate,
};

// Two products, with A in shared memory and in registers, and at most one flaw.
template <Flaw kFlaw>
__device__ void multiply(float* out, const float* in) {
  __shared__ alignas(128) std::uint16_t a[64 * 16], b[8 * 16];
  for (int i = threadIdx.x; i < 64 * 16; i += 128) a[i] = i % 7 << 10;
  b[threadIdx.x] = static_cast<std::uint16_t>(in[threadIdx.x % 64]);
  if (kFlaw != kNoProxyFence) fence_async();
  __syncthreads();
  float d[4] = {in[0], in[1], in[2], in[3]};
  std::uint32_t rows[4] = {threadIdx.x, threadIdx.x + 1, threadIdx.x + 2, threadIdx.x + 3};
  // Without this the compiler may compute them after the fence.
  asm volatile("" : "+r"(rows[0]), "+r"(rows[1]), "+r"(rows[2]), "+r"(rows[3])::"memory");
  const int leading = kFlaw == kOtherDescriptor ? 128 - threadIdx.x / 32 * 16 : 128;
  const int stride = kFlaw == kOutside ? 16384 : 256;
  // Two accumulators begin with the same value, which takes a copy.
  const auto seed = [&] { asm volatile("mov.f32 %0, %1;" : "=f"(d[1]) : "f"(d[0])); };
  if (kFlaw != kSeededLate) seed();
  if (kFlaw != kThreeWarps || threadIdx.x < 96) {
    if (kFlaw != kNoFence) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    if (kFlaw == kSeededLate) seed();
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "l"(descriptor(a, 128, stride)), "l"(descriptor(b, leading, 256))
                 : "memory");
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, 1, 1, 1, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(descriptor(b, 128, 256))
                 : "memory");
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  if (kFlaw == kChangedA) asm volatile("add.u32 %0, %0, 1;" : "+r"(rows[0]));
  if (kFlaw == kChangedB) b[threadIdx.x] = 1;
  if (kFlaw != kNoWait) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])::"memory");
  }
  if (kFlaw == kReusedAfterBarrier) __syncthreads();
  if (kFlaw == kReusedA || kFlaw == kReusedAfterBarrier) a[threadIdx.x / 32 * 256 + threadIdx.x % 32] = 1;  // own rows
  out[threadIdx.x] = d[0] + d[1] + d[2] + d[3] + rows[0];
  if (kFlaw == kNoWait) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}

DEFECT(no_wgmma_fence) { multiply<kDefect ? kNoFence : kNone>(out, in); }
BOTH(no_wgmma_fence);
DEFECT(no_proxy_fence) { multiply<kDefect ? kNoProxyFence : kNone>(out, in); }
BOTH(no_proxy_fence);
DEFECT(no_wgmma_wait) { multiply<kDefect ? kNoWait : kNone>(out, in); }
BOTH(no_wgmma_wait);
DEFECT(three_warps) { multiply<kDefect ? kThreeWarps : kNone>(out, in); }
BOTH(three_warps);
DEFECT(other_descriptor) { multiply<kDefect ? kOtherDescriptor : kNone>(out, in); }
BOTH(other_descriptor);
DEFECT(changed_a) { multiply<kDefect ? kChangedA : kNone>(out, in); }
BOTH(changed_a);
DEFECT(changed_b) { multiply<kDefect ? kChangedB : kNone>(out, in); }
BOTH(changed_b);
DEFECT(reused_a) { multiply<kDefect ? kReusedA : kReusedAfterBarrier>(out, in); }
BOTH(reused_a);
DEFECT(descriptor_outside) { multiply<kDefect ? kOutside : kNone>(out, in); }
BOTH(descriptor_outside);

DEFECT(seeded_late) { multiply<kDefect ? kSeededLate : kNone>(out, in); }
BOTH(seeded_late);

DEFECT(too_many_registers) {
  if (kDefect) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 256;");
  } else if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
  }
  out[threadIdx.x % 64] = 1;
}
BOTH(too_many_registers);

// ---- clusters of two blocks

__device__ inline unsigned rank() {
  unsigned result;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(result));
  return result;
}
// The address of the same variable in another block.
__device__ inline std::uint32_t in_block(unsigned block, const volatile void* variable) {
  std::uint32_t result;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(result) : "r"(shared_address(variable)), "r"(block));
  return result;
}
__device__ inline void store_to(std::uint32_t address, float value) {
  asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
__device__ inline float load_from(std::uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
__device__ inline void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}
__device__ inline void wait_for_cluster(std::uint64_t* barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra AGAIN;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

enum Gap { kNoGap, kNoStart, kNoOrder, kRelaxed, kNoEnd };

// Each block writes into the other one.
template <Gap kGap>
__device__ void exchange(float* out, const float* in) {
  __shared__ volatile float row[64];
  if (kGap != kNoStart) cluster_sync();
  store_to(in_block(rank() ^ 1, &row[threadIdx.x]), in[threadIdx.x]);
  if (kGap == kRelaxed) {
    cluster_arrive_relaxed();
    cluster_wait();
  } else if (kGap == kNoOrder) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  out[64 * blockIdx.x + threadIdx.x] = row[threadIdx.x];
  if (kGap == kNoOrder) cluster_sync();
}

DEFECT(peer_not_started) { exchange<kDefect ? kNoStart : kNoGap>(out, in); }
BOTH(peer_not_started);
DEFECT(peer_not_ordered) { exchange<kDefect ? kNoOrder : kNoGap>(out, in); }
BOTH(peer_not_ordered);
DEFECT(relaxed_arrival) { exchange<kDefect ? kRelaxed : kNoGap>(out, in); }
BOTH(relaxed_arrival);

// Each block reads from the other one, which must not exit before.
DEFECT(peer_exits) {
  __shared__ volatile float row[64];
  row[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  out[64 * blockIdx.x + threadIdx.x] = load_from(in_block(rank() ^ 1, &row[63 - threadIdx.x]));
  if (!kDefect) cluster_sync();
}
BOTH(peer_exits);

DEFECT(two_arrivals) {
  cluster_arrive();
  if (kDefect) cluster_arrive();
  cluster_wait();
  out[64 * blockIdx.x + threadIdx.x] = 1;
}
BOTH(two_arrivals);

DEFECT(address_of_another_block) {
  __shared__ volatile float row[64];
  row[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  float value;
  const std::uint32_t address = in_block(rank() ^ 1, &row[threadIdx.x]);
  if (kDefect) {
    asm volatile("ld.shared::cta.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  } else {
    value = load_from(address);
  }
  out[64 * blockIdx.x + threadIdx.x] = value;
  cluster_sync();
}
BOTH(address_of_another_block);

enum Slip { kNoSlip, kInitNotFenced, kScopeOfBlock, kWaitInBlock };

// Each thread writes into the other block and arrives at an mbarrier there.
template <Slip kSlip>
__device__ void signal_peer(float* out, const float* in) {
  __shared__ volatile float row[64];
  __shared__ std::uint64_t barrier;
  if (threadIdx.x == 0) {
    init_mbarrier(&barrier, 64);
    if (kSlip != kInitNotFenced) fence_init();
  }
  cluster_arrive_relaxed();
  cluster_wait();
  store_to(in_block(rank() ^ 1, &row[threadIdx.x]), in[threadIdx.x]);
  const std::uint32_t remote = in_block(rank() ^ 1, &barrier);
  if (kSlip == kScopeOfBlock) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
  } else {
    asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(remote) : "memory");
  }
  if (kSlip == kWaitInBlock) {
    wait(&barrier, 0);
  } else {
    wait_for_cluster(&barrier, 0);
  }
  out[64 * blockIdx.x + threadIdx.x] = row[63 - threadIdx.x];
  cluster_sync();
}

DEFECT(init_not_fenced_for_peers) { signal_peer<kDefect ? kInitNotFenced : kNoSlip>(out, in); }
BOTH(init_not_fenced_for_peers);
DEFECT(arrival_without_scope) { signal_peer<kDefect ? kScopeOfBlock : kNoSlip>(out, in); }
BOTH(arrival_without_scope);
DEFECT(wait_without_scope) { signal_peer<kDefect ? kWaitInBlock : kNoSlip>(out, in); }
BOTH(wait_without_scope);

__device__ inline void start_with(std::uint64_t* barrier, int bytes) {
  if (threadIdx.x == 0) {
    init_mbarrier(barrier, 1);
    fence_init();
    expect(barrier, bytes);
  }
  cluster_sync();
}

DEFECT(store_async_not_awaited) {
  __shared__ volatile float row[64];
  __shared__ std::uint64_t barrier;
  start_with(&barrier, 256);
  const std::uint32_t target = in_block(rank() ^ 1, &row[threadIdx.x]);
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.f32 [%0], %1, [%2];" ::"r"(target),
               "f"(in[threadIdx.x]), "r"(in_block(rank() ^ 1, &barrier))
               : "memory");
  if (!kDefect) wait_for_cluster(&barrier, 0);
  out[64 * blockIdx.x + threadIdx.x] = row[threadIdx.x];
  wait_for_cluster(&barrier, 0);
}
BOTH(store_async_not_awaited);

// All threads of both blocks add to one counter in block 0.
DEFECT(reduction_not_awaited) {
  __shared__ volatile unsigned sum;
  __shared__ std::uint64_t barrier;
  if (threadIdx.x == 0) sum = 0;
  start_with(&barrier, 512);
  asm volatile("red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [%0], %1, [%2];" ::"r"(
                   in_block(0, &sum)),
               "r"(threadIdx.x), "r"(in_block(0, &barrier))
               : "memory");
  if (rank() != 0) return;
  if (!kDefect) wait_for_cluster(&barrier, 0);
  out[64 * blockIdx.x + threadIdx.x] = sum;
  wait_for_cluster(&barrier, 0);
}
BOTH(reduction_not_awaited);

enum Haste { kNoHaste, kNotFenced, kSourceReused, kNotAwaited };

// Block 0 copies into block 1, which tells it when the data have arrived.
template <Haste kHaste>
__device__ void copy_to_peer(float* out, const float* in) {
  __shared__ alignas(128) volatile float row[64];
  __shared__ std::uint64_t barrier;
  if (rank() == 0) row[threadIdx.x] = in[threadIdx.x];
  if (kHaste != kNotFenced) fence_async();
  start_with(&barrier, 256);
  if (rank() == 0 && threadIdx.x == 0) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], 256, [%2];" ::"r"(
                     in_block(1, row)),
                 "r"(shared_address(row)), "r"(in_block(1, &barrier))
                 : "memory");
    if (kHaste == kSourceReused) row[0] = 0;
  }
  if (rank() == 1) {
    if (kHaste != kNotAwaited) wait_for_cluster(&barrier, 0);
    out[64 * blockIdx.x + threadIdx.x] = row[threadIdx.x];
    wait_for_cluster(&barrier, 0);
  }
  cluster_sync();
  if (rank() == 0) row[threadIdx.x] = 0;
}

DEFECT(copy_of_ordinary_writes) { copy_to_peer<kDefect ? kNotFenced : kNoHaste>(out, in); }
BOTH(copy_of_ordinary_writes);
DEFECT(source_reused) { copy_to_peer<kDefect ? kSourceReused : kNoHaste>(out, in); }
BOTH(source_reused);
DEFECT(copy_from_peer_not_awaited) { copy_to_peer<kDefect ? kNotAwaited : kNoHaste>(out, in); }
BOTH(copy_from_peer_not_awaited);

// Block 0 loads for both blocks; each waits for its own copy.
DEFECT(multicast_not_awaited) {
  __shared__ alignas(128) volatile float row[64];
  __shared__ std::uint64_t barrier;
  start_with(&barrier, 256);
  if (rank() == 0 && threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 256, [%2], "
        "%3;" ::"r"(shared_address(row)),
        "l"(in), "r"(shared_address(&barrier)), "h"(static_cast<std::uint16_t>(3))
        : "memory");
  }
  if (!kDefect || rank() == 0) wait(&barrier, 0);
  out[64 * blockIdx.x + threadIdx.x] = row[threadIdx.x];
  wait(&barrier, 0);
}
BOTH(multicast_not_awaited);

// A block that loads into another one and exits leaves the waiting to that one.
DEFECT(exit_with_incoming_copy) {
  __shared__ alignas(128) volatile float row[64];
  __shared__ std::uint64_t barrier;
  start_with(&barrier, 256);
  if (rank() == 0 && threadIdx.x == 0) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 256, [%2], "
        "%3;" ::"r"(shared_address(row)),
        "l"(in), "r"(shared_address(&barrier)), "h"(static_cast<std::uint16_t>(2))
        : "memory");
  }
  if (!kDefect && rank() == 1) wait(&barrier, 0);
}
BOTH(exit_with_incoming_copy);

// ---- kernels that start before those ahead of them in the stream have ended

__device__ inline void grid_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

DEFECT(read_before_grid_wait) {
  float value = kDefect ? *(volatile const float*)&in[threadIdx.x] : 0;
  grid_wait();
  if (!kDefect) value = *(volatile const float*)&in[threadIdx.x];
  out[threadIdx.x] = value;
}
BOTH(read_before_grid_wait);

DEFECT(write_before_grid_wait) {
  if (!kDefect) grid_wait();
  out[threadIdx.x] = 1;
  if (kDefect) grid_wait();
}
BOTH(write_before_grid_wait);

// One thread waits, the others behind a barrier.
DEFECT(grid_wait_of_another_thread) {
  if (kDefect) __syncthreads();
  if (threadIdx.x == 0) grid_wait();
  if (!kDefect) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}
BOTH(grid_wait_of_another_thread);

DEFECT(no_grid_wait) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (!kDefect) grid_wait();
}
BOTH(no_grid_wait);
#endif
