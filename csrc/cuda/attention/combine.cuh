// Adding the partial results of the decode kernel (decode.cuh): those of the warps of a block, then, in the workspace,
// those of the splits of a row block. The blocks of the splits form a tree of sums. Of the blocks that share a node,
// the last to arrive adds its parts, always in the order of their numbers:
//
//   128 splits of 24 rows     0 ... 5  | 6 ... 11 | ... |  126 127          the last block of each node of 6
//   22 sums                      0 ... 5     | 6 ... 11 | ... | 18 ... 21   the last of each node of 6
//   4 sums                                   0 ... 3                        the last of all, which writes the rows
//
// Everything that a block adds is in flight at once: the parts of the others are copied to the place of the tiles in
// shared memory, not through registers, and its own part stays in registers. A node is as large as the tiles have room
// for (at most kFanIn parts). On an H200 a level took 1.9 us (a write, two fences with a semaphore between them, one
// trip to L2) and 0.67 us for each part of 24 rows, 128 wide, 9.2 KiB: the four warps of one block fetch and add the
// parts one after the other. The three levels above were 17 of the 44 us that 131072 keys took; Hopper now has clusters
// for it (hopper/attention_decode.cuh).
#pragma once

#include <cstdint>

#include "attention/decode_plan.cuh"
#include "attention/softmax.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

// The four channels of a row that a thread owns throughout: number `i` of kVectors.
template <int kHeadDim>
struct OwnVector {
  int row, channel;
  __device__ OwnVector(int thread, int i) {
    const int vector = thread + i * kDecodeThreads;
    row = vector / (kHeadDim / 4);
    channel = vector % (kHeadDim / 4) * 4;
  }
};

// Computes the totals and the factor of each part from the statistics of `count` parts in shared memory. The caller has
// barriers before and after it.
template <int kRows>
__device__ inline void combine_statistics(DecodeShared<kRows>* shared, int count, int rows, int thread) {
  if (thread >= rows) return;
  float maximum = shared->statistics[0][thread].maximum;
  for (int part = 1; part < count; ++part) maximum = fmaxf(maximum, shared->statistics[part][thread].maximum);
  const float finite_maximum = finite_max(maximum);
  float sum = 0.0f;
  for (int part = 0; part < count; ++part) {
    const Statistics of_part = shared->statistics[part][thread];
    const float factor = exp2_approx(of_part.maximum - finite_maximum);
    shared->factor[part][thread] = factor;
    sum = fmaf(of_part.sum, factor, sum);
  }
  shared->total[thread] = {maximum, sum};
}

__device__ inline void add_scaled(float4& total, const float4& part, float factor) {
  total.x = fmaf(part.x, factor, total.x);
  total.y = fmaf(part.y, factor, total.y);
  total.z = fmaf(part.z, factor, total.z);
  total.w = fmaf(part.w, factor, total.w);
}

// The sum of the outputs of the warps, for four channels of a row.
template <int kHeadDim, int kRowTiles>
__device__ inline float4 add_warps(unsigned char* shared_memory, const OwnVector<kHeadDim>& own) {
  using Tiles = DecodeTiles<kHeadDim, kRowTiles>;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
  for (int warp = 0; warp < kDecodeWarps; ++warp) {
    const unsigned char* part = shared_memory + warp * Tiles::kOutBytes + Tiles::out_offset(own.row, own.channel);
    const float factor = Tiles::shared_of(shared_memory)->factor[warp][own.row];
    add_scaled(total, *reinterpret_cast<const float4*>(part), factor);
  }
  return total;
}

// Four sums in the form of a partial result.
struct Stored {
  uint2 high;         // the upper halves
  std::uint32_t low;  // the next byte of each
};

// Rounds to the nearest float of 16 significant bits, in the upper 24; the last 8 bits are ignored. A NaN needs care: a
// carry could run through it into the sign, and the bits that tell it from an infinity may be among those 8.
__device__ inline std::uint32_t round_to_store(float value) {
  return isnan(value) ? 0x7FFFFFFFu : __float_as_uint(value) + 0x80u;
}

__device__ inline Stored to_stored(const float4& values) {
  const std::uint32_t bits[4] = {round_to_store(values.x), round_to_store(values.y), round_to_store(values.z),
                                 round_to_store(values.w)};
  return {make_uint2(__byte_perm(bits[0], bits[1], 0x7632), __byte_perm(bits[2], bits[3], 0x7632)),
          __byte_perm(__byte_perm(bits[0], bits[1], 0x0051), __byte_perm(bits[2], bits[3], 0x0051), 0x5410)};
}

__device__ inline float4 from_stored(const Stored& stored) {
  const auto value = [&](std::uint32_t high, int selector) {
    return __uint_as_float(__byte_perm(high, stored.low, selector) & 0xFFFFFF00u);
  };
  return make_float4(value(stored.high.x, 0x1040), value(stored.high.x, 0x3250), value(stored.high.y, 0x1060),
                     value(stored.high.y, 0x3270));
}

// Writes the block's part, `own`, for the block that adds it.
template <int kRows, int kHeadDim, int kVectors>
__device__ inline void write_partial(unsigned char* partial, const Stored (&own)[kVectors],
                                     const DecodeShared<kRows>* shared, int partial_rows, int rows, int thread) {
  using Layout = PartialLayout<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const OwnVector<kHeadDim> vector(thread, i);
    if (vector.row >= rows) continue;
    unsigned char* row = partial + vector.row * Layout::kRowBytes;
    *reinterpret_cast<uint2*>(row + 2 * vector.channel) = own[i].high;
    *reinterpret_cast<std::uint32_t*>(row + Layout::kLowBytes + vector.channel) = own[i].low;
  }
  if (thread < rows) {
    reinterpret_cast<Statistics*>(partial + Layout::statistics_at(partial_rows))[thread] = shared->total[thread];
  }
}

// Begins to copy the `count` parts of a node, all but that of this block: the statistics as one group of copies, the
// rows as another, one part after the other at `places`. Both come from L2, which holds the writes of other blocks.
template <int kRows, int kHeadDim>
__device__ inline void fetch_partials(std::uint32_t places, DecodeShared<kRows>* shared, const unsigned char* partials,
                                      int count, int own_part, int partial_rows, int rows, int thread) {
  using Layout = PartialLayout<kHeadDim>;
  const std::int64_t bytes = Layout::bytes(partial_rows);
  if (2 * thread < rows) {
    const unsigned char* source = partials + Layout::statistics_at(partial_rows) + thread * kVec16Bytes;
    const int exist = min(rows - 2 * thread, 2) * static_cast<int>(sizeof(Statistics));
#pragma unroll 1
    for (int part = 0; part < count; ++part, source += bytes) {
      if (part != own_part) cp_async(shared_address(&shared->statistics[part][2 * thread]), source, exist);
    }
  }
  cp_async_commit();
  const int row_bytes = rows * Layout::kRowBytes;
#pragma unroll 1
  for (int part = 0; part < count; ++part, partials += bytes) {
    if (part == own_part) continue;
#pragma unroll 4
    for (int at = thread * kVec16Bytes; at < row_bytes; at += kDecodeThreads * kVec16Bytes) {
      cp_async(places + at, partials + at, kVec16Bytes);
    }
    places += row_bytes;
  }
  cp_async_commit();
}

// Adds `count` parts in the order of their numbers; that of this block comes from registers.
template <int kRows, int kHeadDim, int kVectors>
__device__ inline void add_partials(float4 (&total)[kVectors], const Stored (&own)[kVectors],
                                    const DecodeShared<kRows>* shared, const unsigned char* places, int count,
                                    int own_part, int rows, int thread) {
  using Layout = PartialLayout<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) total[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int part = 0; part < count; ++part) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const OwnVector<kHeadDim> vector(thread, i);
      if (vector.row >= rows) continue;
      Stored stored = own[i];
      if (part != own_part) {
        const unsigned char* row = places + vector.row * Layout::kRowBytes;
        stored.high = *reinterpret_cast<const uint2*>(row + 2 * vector.channel);
        stored.low = *reinterpret_cast<const std::uint32_t*>(row + Layout::kLowBytes + vector.channel);
      }
      add_scaled(total[i], from_stored(stored), shared->factor[part][vector.row]);
    }
    if (part != own_part) places += rows * Layout::kRowBytes;
  }
}

// Signals that this block's part is written; returns how many of the `count` blocks of the node signalled before. The
// counter wraps to 0, as the next call must find it.
//
// One thread signals for its block, between two barriers. Release: its fence comes after everything that all threads
// wrote before the first barrier, and before the atomic. Acquire: the atomic, then a fence of the same thread, then the
// second barrier and the reads after it. PTX's memory model asks for the atomic and the fence in one thread: fences of
// the other threads after the barrier would add nothing.
__device__ inline unsigned signal_semaphore(unsigned* semaphore, int count) {
  fence_device();
  const unsigned earlier = atomicInc(semaphore, count - 1);
  fence_device();
  return earlier;
}

// One level of the tree of sums, and a block's place in it.
struct Level {
  unsigned char* partials;  // num_parts of them
  unsigned* semaphores;     // one for each node, the sum of up to fan_in parts: a part of the next level
  int num_parts, part;      // `part`: the one that this block has
};

// Adds the results of the splits of a row block, level by level; returns whether this block has the sum of all. `tiles`
// is shared memory that is no longer used, `tile` the number of the row block among all. fan_in 3, splits 0 to 6:
//
//   level 0     0   1   2     3   4   5     6      each block writes its part, and signals the semaphore of its node
//                \  |  /       \  |  /      |
//   level 1        0             1          2      the last block to signal adds the parts of the node in their order,
//                   \            |          /       and goes on as that part; the others have finished
//   level 2                      0                 the sum of all, in one block
template <int kRows, int kHeadDim, int kVectors>
__device__ inline bool combine_splits(float4 (&total)[kVectors], DecodeShared<kRows>* shared, unsigned char* tiles,
                                      const DecodePlan& plan, std::int64_t tile, int split, int rows, int thread) {
  const std::int64_t partial_bytes = PartialLayout<kHeadDim>::bytes(plan.partial_rows);
  Level level{plan.partials + tile * plan.tile_partials * partial_bytes, plan.semaphores + tile * plan.tile_semaphores,
              plan.num_splits.value, split};
  while (level.num_parts > 1) {
    const auto [node, own_part] = divide(level.part, plan.fan_in);
    const int first_part = level.part - own_part, size = min(level.num_parts - first_part, plan.fan_in.value);
    Stored own[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) own[i] = to_stored(total[i]);
    write_partial<kRows, kHeadDim>(level.partials + level.part * partial_bytes, own, shared, plan.partial_rows, rows,
                                   thread);
    __syncthreads();  // the whole block has written its part before it signals, and has read what it added before
    if (thread == 0) {
      shared->is_last = signal_semaphore(level.semaphores + node, size) == static_cast<unsigned>(size) - 1;
    }
    __syncthreads();  // the parts of blocks that have signalled may be read
    if (!shared->is_last) return false;
    fetch_partials<kRows, kHeadDim>(shared_address(tiles), shared, level.partials + first_part * partial_bytes, size,
                                    own_part, plan.partial_rows, rows, thread);
    if (thread < rows) shared->statistics[own_part][thread] = shared->total[thread];
    cp_async_wait<1>();
    __syncthreads();  // all statistics have arrived
    combine_statistics(shared, size, rows, thread);
    cp_async_wait<0>();
    __syncthreads();  // all rows and factors are complete
    add_partials<kRows, kHeadDim>(total, own, shared, tiles, size, own_part, rows, thread);
    const int num_nodes = (level.num_parts + plan.fan_in.value - 1) / plan.fan_in;
    level = {level.partials + level.num_parts * partial_bytes, level.semaphores + num_nodes, num_nodes, node};
  }
  return true;
}

}  // namespace andromeda::cuda
