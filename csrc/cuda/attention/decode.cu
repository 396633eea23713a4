// attention for few query rows on the GPU: when this kernel is the better one, the number of splits, workspace, launch.
// The kernel is in decode.cuh; the one for Hopper, with clusters, is in hopper/attention_decode.cuh.
//
// Both choices follow from the shapes and the device alone, never from data: a captured graph stays valid. They
// minimise a model of the cost whose unit is a step, the 64 keys and values (32 KiB) that a block takes at a time:
//
//   waves * (kBlockSteps + steps of a split * blocks per multiprocessor)
//       + for each level of combining: kLevelSteps + bytes / kStepBytes
//
// The constants are the best fit to 43 measurements, numbers of splits of four shapes (1 x 131072, 16 x 8192, 64 x 2048
// and 1 x 8192 keys, 24 heads, 128 wide) on an H200: 6 % off in the mean, 15 % at worst, and the best number of each
// shape is found. A step takes a block 1.04 us, alone on its multiprocessor: 132 blocks then already get 4.2 TB/s, and
// two on one take twice as long. With one to two on average, the time lies between that of the fullest multiprocessors
// and that of the memory: the mean of both fits. Starting a block, its first access to memory and adding up its warps
// take 6 us. A level of combining takes 1.9 us of waiting, and 0.67 us for each partial result of 24 rows (9.2 KiB):
// one block fetches and adds them one after the other.
//
// Clusters have not been measured; their loop is the same, and their two levels are counted. Through shared memory: a
// barrier of the cluster and a read of it, 200 clocks each, 10.5 KiB at 16 bytes a clock, and about 400 clocks of
// instructions. Through the workspace: the waiting of a level, as measured, and for each slice of 24 rows (1.7 KiB) 55
// clocks for the bytes, at 32 a clock, which hide the instructions. A cluster lies in one of the groups of 16 or 18
// multiprocessors that a device consists of; clusters of eight leave two of 18 idle.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/decode.cuh"
#include "attention/launch.h"
#include "hopper/attention_decode.h"
#include "hopper/device.h"

namespace andromeda::cuda {
namespace {

constexpr char kKernel[] = "attention_decode";

constexpr double kBlockSteps = 5.7;
constexpr double kLevelSteps = 1.9;
constexpr double kStepBytes = 14.3 * 1024.0;
constexpr double kClusterSteps = 0.8;
constexpr double kClusterStepBytes = 57.0 * 1024.0;
constexpr int kGroupOfMultiprocessors = 16;

// With more packed rows the prefill kernel has enough blocks.
constexpr int kMaxRows = 4096;
constexpr int kPrefillRows = 128;  // of a block of the prefill kernel, all of one head

// Goes from `count` splits to one result, `fan_in` at a time: calls function(parts of a level, nodes of a level).
template <typename Function>
void for_each_level(std::int64_t count, std::int64_t fan_in, const Function& function) {
  while (count > 1) {
    const std::int64_t num_nodes = ceil_div(count, fan_in);
    function(count, num_nodes);
    count = num_nodes;
  }
}

// How many of `count` results to add at a time: as few levels as `max_fan_in` permits, and nodes as small as possible
// for so many levels. 17 are 5 x 4 rather than 8 x 3: the last block waits for 9 of them instead of 11.
std::int64_t fan_in_of(std::int64_t count, std::int64_t max_fan_in) {
  const auto power = [](std::int64_t fan_in, int levels) {
    std::int64_t product = 1;
    for (int level = 0; level < levels; ++level) product *= fan_in;
    return product;
  };
  int levels = 1;
  while (power(max_fan_in, levels) < count) ++levels;
  std::int64_t fan_in = 2;
  while (power(fan_in, levels) < count) ++fan_in;
  return fan_in;
}

std::int64_t num_rows_of(const AttentionParams& params) {
  return static_cast<std::int64_t>(params.seqlen_q) * (params.num_heads / params.num_kv_heads);
}

int num_row_tiles_of(std::int64_t num_rows) { return num_rows <= 16 ? 1 : 2; }

// Whether the blocks of several splits are clusters.
bool has_clusters() {
#ifdef ANDROMEDA_HOPPER
  return hopper::is_current_device({kKernel, 0, kDecodeThreads, 0});
#else
  return false;
#endif
}

// Splits in clusters: as many as are asked for or a few more, so that no cluster has fewer blocks than the others.
struct Clusters {
  int size_log2;
  std::int64_t count, num_splits;

  static Clusters of(std::int64_t num_splits) {
    int size_log2 = 0;
    while ((1 << size_log2) < std::min<std::int64_t>(num_splits, kMaxClusterSize)) ++size_log2;
    const std::int64_t count = ceil_div(num_splits, 1 << size_log2);
    return {size_log2, count, count << size_log2};
  }
};

// Partial results have room for the rows of a tile that exist; only the last of several tiles may have fewer.
struct PartialShape {
  int rows, bytes, max_fan_in;
  int slice_floats;  // of a cluster's
};

PartialShape partial_shape_of(const AttentionParams& params) {
  const std::int64_t num_rows = num_rows_of(params);
  PartialShape shape{};
  dispatch_attention(params, [&](auto, auto head_dim) {
    const auto with_row_tiles = [&](auto row_tiles) {
      using Tiles = DecodeTiles<head_dim(), row_tiles()>;
      shape.rows = static_cast<int>(std::clamp<std::int64_t>(num_rows, 1, Tiles::kRows));
      shape.bytes = PartialLayout<head_dim()>::bytes(shape.rows);
      shape.max_fan_in = Tiles::max_fan_in(shape.rows);
      shape.slice_floats = SliceLayout<head_dim()>::size(shape.rows);
    };
    if (num_row_tiles_of(num_rows) == 1) {
      with_row_tiles(std::integral_constant<int, 1>{});
    } else {
      with_row_tiles(std::integral_constant<int, 2>{});
    }
  });
  return shape;
}

// Blocks that run at the same time: registers permit two on each multiprocessor, and shared memory does on 8.0 and 9.0.
struct Slots {
  std::int64_t num_multiprocessors, num_blocks;

  // Those that clusters of eight can use.
  Slots for_clusters() const {
    const std::int64_t usable =
        std::max<std::int64_t>(num_multiprocessors / kGroupOfMultiprocessors, 1) * kGroupOfMultiprocessors;
    if (usable >= num_multiprocessors) return *this;
    return {usable, num_blocks / num_multiprocessors * usable};
  }
};

Slots count_slots() {
  const Launch launch{kKernel, 0, kDecodeThreads, 0};
  const int num_multiprocessors = count_multiprocessors(launch);
  int device = 0, shared_bytes = 0;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                       launch);
  constexpr int kBlockBytes = DecodeTiles<128, 2>::kBytes + 1024;  // the system takes 1 KiB per block
  return {num_multiprocessors, std::int64_t{num_multiprocessors} * std::clamp(shared_bytes / kBlockBytes, 1, 2)};
}

double cost_of_waves(std::int64_t num_tiles, std::int64_t num_steps, std::int64_t num_splits, const Slots& slots) {
  const std::int64_t num_blocks = num_tiles * num_splits, waves = ceil_div(num_blocks, slots.num_blocks);
  const double per_multiprocessor =
      static_cast<double>(num_blocks) / static_cast<double>(waves * slots.num_multiprocessors);
  const double sharing = (std::ceil(per_multiprocessor) + std::max(per_multiprocessor, 1.0)) / 2.0;
  return static_cast<double>(waves) * (kBlockSteps + static_cast<double>(ceil_div(num_steps, num_splits)) * sharing);
}

double cost_of_levels(std::int64_t num_splits, const PartialShape& partial) {
  double cost = 0.0;
  const std::int64_t fan_in = fan_in_of(num_splits, partial.max_fan_in);
  for_each_level(num_splits, fan_in, [&](std::int64_t parts, std::int64_t) {
    cost += kLevelSteps + static_cast<double>(std::min(parts, fan_in) * partial.bytes) / kStepBytes;
  });
  return cost;
}

double cost_of_clusters(std::int64_t num_splits, const PartialShape& partial) {
  if (num_splits == 1) return 0.0;
  const Clusters clusters = Clusters::of(num_splits);
  if (clusters.count == 1) return kClusterSteps;
  const std::int64_t bytes = clusters.count * partial.slice_floats * static_cast<std::int64_t>(sizeof(float));
  return kClusterSteps + kLevelSteps + static_cast<double>(bytes) / kClusterStepBytes;
}

std::int64_t num_steps_of(const AttentionParams& params) {
  return std::max<std::int64_t>(ceil_div(params.seqlen_k, kDecodeStep), 1);
}

struct Layout {
  std::int64_t num_tiles, num_row_blocks, num_splits;
  int cluster_size_log2 = 0;
  std::int64_t fan_in = 1, num_partials, partial_floats, num_semaphores;  // of a tile
  PartialShape partial;

  std::int64_t num_floats() const { return num_tiles * num_partials * partial_floats; }
};

// The clusters or the tree of sums, and the workspace, of a call with params.num_splits.
Layout lay_out(const AttentionParams& params) {
  const std::int64_t num_rows = num_rows_of(params);
  Layout layout{};
  layout.num_row_blocks = ceil_div(num_rows, 16 * num_row_tiles_of(num_rows));
  layout.num_tiles = static_cast<std::int64_t>(params.batch) * params.num_kv_heads * layout.num_row_blocks;
  layout.partial = partial_shape_of(params);
  // A split beyond the number of steps would have no keys, and add nothing but its partial result.
  layout.num_splits = std::min<std::int64_t>(params.num_splits, num_steps_of(params));
  if (layout.num_tiles == 0) return layout;
  if (layout.num_splits > 1 && has_clusters()) {
    const Clusters clusters = Clusters::of(layout.num_splits);
    layout.num_splits = clusters.num_splits;
    layout.cluster_size_log2 = clusters.size_log2;
    if (clusters.count == 1) return layout;
    layout.num_partials = clusters.count * kMaxClusterSize;
    layout.partial_floats = layout.partial.slice_floats;
    layout.num_semaphores = kMaxClusterSize;
    return layout;
  }
  layout.fan_in = fan_in_of(layout.num_splits, layout.partial.max_fan_in);
  layout.partial_floats = layout.partial.bytes / static_cast<std::int64_t>(sizeof(float));
  for_each_level(layout.num_splits, layout.fan_in, [&](std::int64_t num_parts, std::int64_t num_nodes) {
    layout.num_partials += num_parts;
    layout.num_semaphores += num_nodes;
  });
  return layout;
}

struct Choice {
  std::int64_t num_splits;
  double cost;
};

Choice choose_splits(const AttentionParams& params, const Slots& slots) {
  const std::int64_t num_rows = num_rows_of(params), num_steps = num_steps_of(params);
  const std::int64_t num_tiles = static_cast<std::int64_t>(params.batch) * params.num_kv_heads *
                                 ceil_div(num_rows, 16 * num_row_tiles_of(num_rows));
  if (num_tiles == 0) return {1, 0.0};
  const PartialShape partial = partial_shape_of(params);
  const bool clusters = has_clusters();
  const auto cost_of = [&](std::int64_t num_splits) {
    if (!clusters) return cost_of_waves(num_tiles, num_steps, num_splits, slots) + cost_of_levels(num_splits, partial);
    const Slots usable = num_splits < kMaxClusterSize ? slots : slots.for_clusters();
    return cost_of_waves(num_tiles, num_steps, num_splits, usable) + cost_of_clusters(num_splits, partial);
  };
  Choice best{1, cost_of(1)};
  // With many tiles a few splits still even out the last wave; with few tiles there are as many as make one wave. Large
  // numbers need not be tried one by one: each stands for the smallest that gives splits of the same length.
  const std::int64_t max_splits = std::min(num_steps, std::max<std::int64_t>(kFanIn, slots.num_blocks / num_tiles));
  for (std::int64_t candidate = 2; candidate <= max_splits; candidate += 1 + candidate / 16) {
    std::int64_t num_splits = ceil_div(num_steps, ceil_div(num_steps, candidate));
    if (clusters) num_splits = Clusters::of(num_splits).num_splits;
    if (const double cost = cost_of(num_splits); cost < best.cost) best = {num_splits, cost};
  }
  return best;
}

// Partial results are read 16 bytes at a time.
void check_workspace(const AttentionWorkspace& workspace, std::int64_t num_floats, std::int64_t num_semaphores) {
  if (workspace.num_partials < num_floats || workspace.num_semaphores < num_semaphores ||
      reinterpret_cast<std::uintptr_t>(workspace.partials) % kVec16Bytes != 0) {
    throw std::invalid_argument(std::string(kKernel) + ": the workspace must have " + std::to_string(num_floats) +
                                " values, aligned to 16 bytes, and " + std::to_string(num_semaphores) +
                                " semaphores, got " + std::to_string(workspace.num_partials) + " and " +
                                std::to_string(workspace.num_semaphores) + "; size it on the device of the call");
  }
}

template <typename T, int kHeadDim, int kRowTiles>
void launch(const AttentionParams& params, const DecodePlan& plan, std::int64_t num_blocks, CUstream_st* stream) {
  using Tiles = DecodeTiles<kHeadDim, kRowTiles>;
  const auto kernel = &attention_decode_kernel<T, kHeadDim, kRowTiles>;
  const Launch launch{kKernel, checked_grid(params, kKernel, num_blocks), kDecodeThreads, Tiles::kBytes};
  allow_shared_bytes(kernel, launch);
  kernel<<<launch.num_blocks, dim3(kWarpLanes, kDecodeWarps), launch.shared_bytes, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
}

}  // namespace

int choose_num_splits(const AttentionParams& params) {
  if (params.num_splits != 0) return params.num_splits;
  const std::int64_t num_rows = num_rows_of(params);
  if (params.num_keys != nullptr) return static_cast<int>(choose_splits(params, count_slots()).num_splits);
  if (num_rows > kMaxRows) return kNotSplit;
  const Slots slots = count_slots();
  // A step of the prefill kernel, 64 keys for 128 rows, is about as long: its products take the time that a step of
  // this kernel needs for memory. But beyond 128 rows it reads a key less often, so the gain here must be a clear one.
  const std::int64_t prefill_tiles =
      static_cast<std::int64_t>(params.batch) * params.num_heads * ceil_div(params.seqlen_q, kPrefillRows);
  const double prefill_cost = cost_of_waves(prefill_tiles, ceil_div(params.seqlen_k, kDecodeStep), 1, slots);
  const Choice choice = choose_splits(params, slots);
  const double cost = choice.cost * (num_rows <= kPrefillRows ? 1.0 : 2.0);
  return cost <= prefill_cost ? static_cast<int>(choice.num_splits) : kNotSplit;
}

AttentionWorkspace attention_decode_workspace(const AttentionParams& params) {
  const Layout layout = lay_out(params);
  return {nullptr, nullptr, layout.num_floats(), layout.num_tiles * layout.num_semaphores, params.num_splits};
}

void attention_decode(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream) {
  const Layout layout = lay_out(params);
  if (layout.num_tiles == 0) return;
  check_workspace(workspace, layout.num_floats(), layout.num_tiles * layout.num_semaphores);

  DecodePlan plan{};
  plan.partials = reinterpret_cast<unsigned char*>(workspace.partials);
  plan.semaphores = reinterpret_cast<unsigned*>(workspace.semaphores);
  plan.num_rows = static_cast<int>(num_rows_of(params));
  plan.cluster_size_log2 = layout.cluster_size_log2;
  plan.qhead_per_kvhead = Divisor::of(params.num_heads / params.num_kv_heads);
  plan.num_kv_heads = Divisor::of(params.num_kv_heads);
  plan.num_row_blocks = Divisor::of(layout.num_row_blocks);
  plan.num_splits = Divisor::of(layout.num_splits);
  plan.num_clusters = Divisor::of(layout.num_splits >> plan.cluster_size_log2);
  plan.tile_partials = static_cast<int>(layout.num_partials);
  plan.tile_semaphores = static_cast<int>(layout.num_semaphores);
  plan.fan_in = Divisor::of(layout.fan_in);
  plan.partial_rows = layout.partial.rows;
  plan.softmax_scale_log2 = softmax_scale_log2_of(params);
  plan.inverse_softmax_scale = 1.0f / params.softmax_scale;
  plan.is_aligned16 = is_aligned16(params);

  const std::int64_t num_blocks = layout.num_tiles * layout.num_splits;
#ifdef ANDROMEDA_HOPPER
  if (layout.cluster_size_log2 > 0) {
    return hopper::launch_attention_decode(params, plan, num_row_tiles_of(num_rows_of(params)),
                                           checked_grid(params, kKernel, num_blocks), stream);
  }
#endif
  dispatch_attention(params, [&](auto dtype, auto head_dim) {
    using T = typename decltype(dtype)::type;
    if (num_row_tiles_of(num_rows_of(params)) == 1) {
      launch<T, head_dim(), 1>(params, plan, num_blocks, stream);
    } else {
      launch<T, head_dim(), 2>(params, plan, num_blocks, stream);
    }
  });
}

}  // namespace andromeda::cuda
