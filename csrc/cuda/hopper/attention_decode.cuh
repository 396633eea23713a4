// attention for few query rows on Hopper: the loop over keys of attention/decode.cuh, whose results are added through
// the shared memory of a cluster.
//
// A cluster is eight blocks (or two, or four, where there are no more splits) with neighbouring splits of one row
// block. Each block leaves the sum of its warps in shared memory, and adds one slice of the channels of all of them:
//
//              channels  0 ... 15 | 16 ... 31 | ... | 112 ... 127       head_dim 128
//   split 0              block 0    block 1     ...   block 7
//   split 1              block 0    block 1     ...   block 7           each adds its slice of the eight parts, in the
//     ...                                                               order of the splits
//   split 7              block 0    block 1     ...   block 7
//
// With more than eight splits a slice of a cluster is a part once more, in the workspace. Slices need nothing of each
// other: each has its own semaphore, and the last block to arrive for a slice adds that slice of all clusters. 128
// splits of 24 rows are 16 clusters, and such a block adds 16 parts of 1.7 KiB. The tree of combine.cuh, for devices
// without clusters, needs three levels, in which one block adds 6 + 6 + 4 parts of 9.2 KiB.
//
// Parts are added in the order of their numbers, in float32: a result does not depend on timing.
//
//   shared memory   that of attention/decode.cuh; the parts lie where the outputs of the warps did
//   registers       those of the loop; a thread then holds four channels and the statistics of 8 or 16 parts
#pragma once

#include <cstdint>

#include "attention/decode.cuh"
#include "hopper/cluster.cuh"

namespace andromeda::cuda::hopper {

// Read from L2, which holds the writes of other blocks, if it exists; else the values stay. (A branch around each of
// many reads would wait for one before the next.)
__device__ inline void ld_global16(float4& values, const float* source, bool exists) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.b32 exists, %5, 0;\n"
      "@exists ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
      "}\n"
      : "+f"(values.x), "+f"(values.y), "+f"(values.z), "+f"(values.w)
      : "l"(__cvta_generic_to_global(source)), "r"(static_cast<int>(exists))
      : "memory");
}

__device__ inline void ld_global8(float& first, float& second, const float* source, bool exists) {
  asm volatile(
      "{\n"
      ".reg .pred exists;\n"
      "setp.ne.b32 exists, %3, 0;\n"
      "@exists ld.global.cg.v2.f32 {%0, %1}, [%2];\n"
      "}\n"
      : "+f"(first), "+f"(second)
      : "l"(__cvta_generic_to_global(source)), "r"(static_cast<int>(exists))
      : "memory");
}

// Four channels of a row of a partial result, relative to the maximum of the row.
struct Part {
  float4 values;
  Statistics statistics;
};

__device__ inline Part empty_part() { return {make_float4(0.0f, 0.0f, 0.0f, 0.0f), {-kInfinity, 0.0f}}; }

// Adds `count` more parts (up to kCount) to a total, in their order. load(part, number, exists) reads one, or nothing:
// the reads do not depend on each other, and all are in flight at once.
template <int kCount, typename Load>
__device__ inline void add_parts(Part& total, int count, const Load& load) {
  Part parts[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    parts[i] = empty_part();
    load(parts[i], i, i < count);
  }
  float maximum = total.statistics.maximum;
#pragma unroll
  for (int i = 0; i < kCount; ++i) maximum = fmaxf(maximum, parts[i].statistics.maximum);
  const float finite_maximum = finite_max(maximum);
  const float factor = exp2_approx(total.statistics.maximum - finite_maximum);
  Part sum = {
      make_float4(total.values.x * factor, total.values.y * factor, total.values.z * factor, total.values.w * factor),
      {maximum, total.statistics.sum * factor}};
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float part_factor = exp2_approx(parts[i].statistics.maximum - finite_maximum);
    add_scaled(sum.values, parts[i].values, part_factor);
    sum.statistics.sum = fmaf(parts[i].statistics.sum, part_factor, sum.statistics.sum);
  }
  total = sum;
}

// Calls function(row, channel) for every four channels of the block's slice, one of 2^slices_log2, that this thread
// owns: one at most where there are eight slices.
template <int kHeadDim, typename Function>
__device__ inline void for_each_vector(int rows, int slices_log2, int rank, int thread, const Function& function) {
  constexpr int kVectors = kHeadDim / 4;  // of a row
#pragma unroll 1
  for (int i = thread; i < (rows * kVectors) >> slices_log2; i += kDecodeThreads) {
    const int row = (i << slices_log2) / kVectors, vectors = kVectors >> slices_log2;
    function(row, (rank * vectors + i - row * vectors) * 4);
  }
}

template <typename T, int kHeadDim, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_decode_cluster_kernel(const __grid_constant__ AttentionParams params,
                                    const __grid_constant__ DecodePlan plan) {
  using Tiles = DecodeTiles<kHeadDim, kRowTiles>;
  using Slice = SliceLayout<kHeadDim>;
  constexpr int kRows = Tiles::kRows;
  extern __shared__ __align__(kTileAlignment) unsigned char shared_memory[];
  const DecodeBlock block = find_decode_block(plan);
  attend_to_split<T, kHeadDim, kRowTiles>(shared_memory, params, plan, block);

  // Add the warps: the sum takes the place of the first one's output. Each thread reads and writes its own channels.
  auto* shared = Tiles::shared_of(shared_memory);
  const int thread = static_cast<int>(threadIdx.y) * kWarpLanes + static_cast<int>(threadIdx.x);
  const int rows = min(plan.num_rows - block.row_block * kRows, kRows);
#pragma unroll
  for (int i = 0; i < kRows * kHeadDim / 4 / kDecodeThreads; ++i) {
    const OwnVector<kHeadDim> own(thread, i);
    if (own.row >= rows) continue;
    const float4 total = add_warps<kHeadDim, kRowTiles>(shared_memory, own);
    *reinterpret_cast<float4*>(shared_memory + Tiles::out_offset(own.row, own.channel)) = total;
  }
  arrive_at_cluster();

  const int cluster_size = 1 << plan.cluster_size_log2, clusters = plan.num_clusters.value;
  const int cluster = block.split >> plan.cluster_size_log2, rank = block.split - (cluster << plan.cluster_size_log2);
  const std::int64_t slice_of_call = row_block_of_call(plan, block) * kMaxClusterSize + rank;
  const int slice_size = Slice::size(plan.partial_rows);
  float* slices = reinterpret_cast<float*>(plan.partials) + slice_of_call * clusters * slice_size;
  const auto finish = [&](const Part& total, int row, int channel) {
    write_vector<T>(params, plan, block.batch, shared, row, channel, total.values, total.statistics.sum);
    if (channel == 0) write_lse(params, block.batch, shared, row, total.statistics);
  };
  wait_for_cluster();  // the parts of all blocks are complete

  // Add the slice of the cluster.
  for_each_vector<kHeadDim>(rows, plan.cluster_size_log2, rank, thread, [&](int row, int channel) {
    const std::uint32_t values = shared_address(shared_memory) + Tiles::out_offset(row, channel);
    const std::uint32_t statistics = shared_address(&shared->total[row]);
    Part total = empty_part();
    add_parts<kMaxClusterSize>(total, cluster_size, [&](Part& part, int other, bool exists) {
      const int block_rank = other & (cluster_size - 1);  // of a block that exists
      ld_cluster8(part.statistics.maximum, part.statistics.sum, map_to_block(statistics, block_rank), exists);
      ld_cluster16(part.values, map_to_block(values, block_rank), exists);
    });
    if (clusters == 1) return finish(total, row, channel);
    float* slice = slices + static_cast<std::int64_t>(cluster) * slice_size;
    const int column = channel - rank * Slice::kChannels;
    *reinterpret_cast<float4*>(slice + row * Slice::kChannels + column) = total.values;
    if (column == 0) {
      reinterpret_cast<Statistics*>(slice + Slice::statistics_at(plan.partial_rows))[row] = total.statistics;
    }
  });
  arrive_at_cluster();  // this block has read what it needs of the others

  // Add that slice of all clusters: the last of the blocks that have it.
  if (clusters > 1) {
    __syncthreads();  // the whole block has written its slice before it signals
    if (thread == 0) {
      shared->is_last =
          signal_semaphore(plan.semaphores + slice_of_call, clusters) == static_cast<unsigned>(clusters) - 1;
    }
    __syncthreads();  // the slices of blocks that have signalled may be read
    if (shared->is_last) {
      for_each_vector<kHeadDim>(rows, kMaxClusterSizeLog2, rank, thread, [&](int row, int channel) {
        const float* values = slices + row * Slice::kChannels + channel - rank * Slice::kChannels;
        const float* statistics = slices + Slice::statistics_at(plan.partial_rows) + 2 * row;
        Part total = empty_part();
#pragma unroll 1
        for (int first = 0; first < clusters; first += kFanIn) {
          add_parts<kFanIn>(total, clusters - first, [&](Part& part, int i, bool exists) {
            const std::int64_t at = static_cast<std::int64_t>(first + i) * slice_size;
            ld_global8(part.statistics.maximum, part.statistics.sum, statistics + at, exists);
            ld_global16(part.values, values + at, exists);
          });
        }
        finish(total, row, channel);
      });
    }
  }
  wait_for_cluster();  // the others have read what they need of this block, which may exit
}

}  // namespace andromeda::cuda::hopper
