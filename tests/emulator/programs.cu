// Kernels that each use one part of the machine, for test_programs.py, which computes the same in Python. 64 threads in
// a block, integers in and out.
#include <cstdint>

#define PROGRAM(name) extern "C" __global__ void name(int* out, const int* in)

// The index is unknown to the compiler, so the array lies in local memory.
PROGRAM(local_array) {
  int row[8];
  for (int i = 0; i < 8; ++i) row[i] = in[threadIdx.x] * i;
  int sum = 0;
  for (int i = 0; i < 3; ++i) sum += row[in[threadIdx.x + i] & 7] << 8 * i;
  out[threadIdx.x] = sum;
}

__constant__ int table[4] = {3, 1, 4, 1};
__device__ int counters[2] = {10, 20};

PROGRAM(module_variables) {
  out[threadIdx.x] = table[in[threadIdx.x] & 3];
  __syncthreads();
  if (threadIdx.x == 0) {
    counters[1] += 5;
    out[64] = counters[0] + counters[1];
  }
}

// One load from either space: generic addresses.
PROGRAM(generic_addresses) {
  __shared__ int row[64];
  row[threadIdx.x] = in[threadIdx.x] + 1;
  __syncthreads();
  const int* choice = threadIdx.x % 2 == 0 ? row : in;
  out[threadIdx.x] = *(volatile const int*)(choice + (threadIdx.x ^ 2));
}

PROGRAM(narrow_types) {
  const auto* bytes = reinterpret_cast<const signed char*>(in);
  const auto* shorts = reinterpret_cast<const std::uint16_t*>(in);
  auto* narrow = reinterpret_cast<signed char*>(out + 64);
  out[threadIdx.x] = bytes[threadIdx.x] + shorts[threadIdx.x];
  narrow[threadIdx.x] = static_cast<signed char>(bytes[threadIdx.x] * 3);
}

PROGRAM(wide_accesses) {
  __shared__ int4 row[16];
  if (threadIdx.x < 16) row[threadIdx.x] = reinterpret_cast<const int4*>(in)[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 32) {
    const int2 pair = reinterpret_cast<int2*>(row)[31 - threadIdx.x];
    reinterpret_cast<int2*>(out)[threadIdx.x] = make_int2(pair.y, pair.x);
  }
}

// Lanes run loops of different lengths and meet again.
PROGRAM(divergent_loops) {
  int steps = 0;
  for (int value = in [threadIdx.x] & 31; value != 1 && value != 0; ++steps) {
    value = value % 2 == 0 ? value / 2 : 3 * value + 1;
  }
  const unsigned same = __ballot_sync(0xffffffff, steps > 10);
  out[threadIdx.x] = steps + 1000 * __popc(same);
}

PROGRAM(atomics) {
  __shared__ int cell;
  if (threadIdx.x == 0) cell = 0;
  __syncthreads();
  atomicAdd(&cell, in[threadIdx.x]);
  atomicMax(out + 1, in[threadIdx.x]);
  atomicMin(out + 2, in[threadIdx.x]);
  atomicOr(out + 3, 1 << threadIdx.x % 32);
  atomicAnd(out + 4, ~(1 << threadIdx.x % 16));
  atomicXor(out + 5, in[threadIdx.x]);
  atomicInc(reinterpret_cast<unsigned*>(out + 6), 9);
  atomicDec(reinterpret_cast<unsigned*>(out + 7), 9);
  atomicAdd(reinterpret_cast<unsigned long long*>(out + 8), 1ull << 32);
  atomicAdd(reinterpret_cast<float*>(out + 10), 0.5f);
  int old = out[11], seen = 0;  // a sum by compare and swap
  do {
    seen = old;
    old = atomicCAS(out + 11, seen, seen + in[threadIdx.x]);
  } while (old != seen);
  if (threadIdx.x == 63) atomicExch(out + 12, 77);
  __syncthreads();
  if (threadIdx.x == 0) out[0] = cell;
}

PROGRAM(block_votes) {
  const int count = __syncthreads_count(in[threadIdx.x] > 30), any = __syncthreads_or(in[threadIdx.x] == 5),
            all = __syncthreads_and(in[threadIdx.x] < 60);
  out[threadIdx.x] = count + 1000 * (any != 0) + 10000 * (all != 0);
}

PROGRAM(warp_votes) {
  const unsigned lane = threadIdx.x % 32;
  const int value = in[threadIdx.x];
  const unsigned sum = __reduce_add_sync(0xffffffff, static_cast<unsigned>(value));
  const int least = __reduce_min_sync(0xffffffff, -value);
  const unsigned same = __match_any_sync(0xffffffff, value % 5);
  int odd = 0;
  if (lane % 2 == 1) odd = __all_sync(0xaaaaaaaa, value >= 0) + 2 * __any_sync(0xaaaaaaaa, value == 63);
  out[threadIdx.x] = sum + 7 * least + __popc(same) * 10000 + odd * 1000000;
}

PROGRAM(warp_scan) {
  int value = in[threadIdx.x];
  const int lane = threadIdx.x % 32;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, value, step);
    if (lane >= step) value += other;
  }
  out[threadIdx.x] = value + 100000 * __shfl_sync(0xffffffff, value, 31);
}

// Copies of 4, 8 and 16 bytes, with and without zeros at their end.
PROGRAM(copies) {
  __shared__ alignas(16) int row[64];
  const auto target = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  const int t = threadIdx.x;
  if (t < 8) asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(target + 4 * t), "l"(in + t) : "memory");
  if (t < 4) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target + 32 + 8 * t), "l"(in + 8 + 2 * t),
                 "r"(2 * t)
                 : "memory");
  }
  if (t < 12) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target + 64 + 16 * t), "l"(in + 16 + 4 * t),
                 "r"(t % 2 ? 16 : t)
                 : "memory");
  }
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  out[t] = row[t];
}

PROGRAM(many_barriers) {
  __shared__ int row[64];
  const int warp = threadIdx.x / 32;
  for (int round = 0; round < 5; ++round) {
    // One warp writes, the other reads: full, then empty.
    if (warp == 0) {
      for (int i = threadIdx.x; i < 64; i += 32) row[i] = in[i] + round;
      asm volatile("bar.arrive 1, 64;" ::: "memory");
      asm volatile("bar.sync 2, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      out[threadIdx.x - 32 + 32 * round] = row[threadIdx.x - 32] + row[threadIdx.x];
      asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}
