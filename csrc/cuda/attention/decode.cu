// attention for few query rows on the GPU: when it is the better kernel, how many shares, workspace and launch. The
// kernel is in decode.cuh.
//
// Both choices follow from the shapes and the device alone, never from data: a captured graph stays valid. They take
// the cheapest by a model whose unit is a step, the 64 keys and values (32 KiB) that a block takes at a time:
//
//   waves * (kBlockSteps + steps of a share * blocks per multiprocessor)
//       + for each level of combining: kLevelSteps + bytes / kStepBytes
//
// The constants are those that fit best to 43 numbers of shares of four shapes (1 x 131072, 16 x 8192, 64 x 2048 and
// 1 x 8192 keys, 24 heads, 128 wide) on an H200: 6 % off in the mean, 15 % at worst, and the best number of each shape
// is found. A step takes a block 1.04 us, alone on its multiprocessor: 132 blocks then already get 4.2 TB/s, and two on
// one take twice as long. Between one and two on average lies what the fullest take and what the memory does: the mean
// of both fits. Starting a block, its first access to memory and the addition of its warps take 6 us. A level of
// combining takes 1.9 us of waiting, and 0.67 us for each partial result of 24 rows (9.2 KiB), which one block fetches
// and adds after the other.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "attention/decode.cuh"
#include "attention/launch.h"

namespace andromeda::cuda {
namespace {

constexpr char kKernel[] = "attention_decode";

constexpr double kBlockSteps = 5.7;
constexpr double kLevelSteps = 1.9;
constexpr double kStepBytes = 14.3 * 1024.0;

// With more packed rows the prefill kernel has blocks enough.
constexpr int kMaxRows = 4096;
constexpr int kPrefillRows = 128;  // of a block of the prefill kernel, all of one head

// From `count` shares to one result, `fan_in` at a time: calls function(results of a level, groups of them).
template <typename Function>
void for_each_level(std::int64_t count, std::int64_t fan_in, const Function& function) {
  while (count > 1) {
    const std::int64_t groups = ceil_div(count, fan_in);
    function(count, groups);
    count = groups;
  }
}

// How many results of `count` to add at a time: as few levels as `max_fan_in` permits, and for them groups as small as
// possible. 17 are 5 x 4 rather than 8 x 3: the block that is last waits for 9 of them instead of 11.
std::int64_t fan_in_of(std::int64_t count, std::int64_t max_fan_in) {
  const auto reach = [](std::int64_t fan_in, int levels) {
    std::int64_t product = 1;
    for (int level = 0; level < levels; ++level) product *= fan_in;
    return product;
  };
  int levels = 1;
  while (reach(max_fan_in, levels) < count) ++levels;
  std::int64_t fan_in = 2;
  while (reach(fan_in, levels) < count) ++fan_in;
  return fan_in;
}

std::int64_t num_rows_of(const AttentionParams& params) {
  return static_cast<std::int64_t>(params.seqlen_q) * (params.num_heads / params.num_kv_heads);
}

int num_groups_of(std::int64_t num_rows) { return num_rows <= 16 ? 1 : 2; }

// Partial results have room for the rows of a tile that exist; only the last of several tiles may have fewer.
struct PartialShape {
  int rows, bytes, max_fan_in;
};

PartialShape partial_shape_of(const AttentionParams& params) {
  const std::int64_t num_rows = num_rows_of(params);
  PartialShape shape{};
  dispatch_attention(params, [&](auto, auto head_dim) {
    const auto with_groups = [&](auto groups) {
      using Tiles = DecodeTiles<head_dim(), groups()>;
      shape.rows = static_cast<int>(std::clamp<std::int64_t>(num_rows, 1, Tiles::kRows));
      shape.bytes = PartialLayout<head_dim()>::bytes(shape.rows);
      shape.max_fan_in = Tiles::max_fan_in(shape.rows);
    };
    if (num_groups_of(num_rows) == 1) {
      with_groups(std::integral_constant<int, 1>{});
    } else {
      with_groups(std::integral_constant<int, 2>{});
    }
  });
  return shape;
}

// Blocks that run at the same time: two on each multiprocessor, by registers and on 8.0 and 9.0 by shared memory too.
struct Slots {
  std::int64_t num_multiprocessors, num_blocks;
};

Slots count_slots() {
  const Launch launch{kKernel, 0, kDecodeThreads, 0};
  int device = 0, num_multiprocessors = 0, shared_bytes = 0;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
                       launch);
  constexpr int kBlockBytes = DecodeTiles<128, 2>::kBytes + 1024;  // the system takes 1 KiB per block
  return {num_multiprocessors, std::int64_t{num_multiprocessors} * std::clamp(shared_bytes / kBlockBytes, 1, 2)};
}

double cost_of_waves(std::int64_t num_tiles, std::int64_t num_steps, std::int64_t num_shares, const Slots& slots) {
  const std::int64_t num_blocks = num_tiles * num_shares, waves = ceil_div(num_blocks, slots.num_blocks);
  const double per_multiprocessor =
      static_cast<double>(num_blocks) / static_cast<double>(waves * slots.num_multiprocessors);
  const double sharing = (std::ceil(per_multiprocessor) + std::max(per_multiprocessor, 1.0)) / 2.0;
  return static_cast<double>(waves) * (kBlockSteps + static_cast<double>(ceil_div(num_steps, num_shares)) * sharing);
}

double cost_of_levels(std::int64_t num_shares, const PartialShape& partial) {
  double cost = 0.0;
  const std::int64_t fan_in = fan_in_of(num_shares, partial.max_fan_in);
  for_each_level(num_shares, fan_in, [&](std::int64_t parts, std::int64_t) {
    cost += kLevelSteps + static_cast<double>(std::min(parts, fan_in) * partial.bytes) / kStepBytes;
  });
  return cost;
}

std::int64_t num_steps_of(const AttentionParams& params) {
  return std::max<std::int64_t>(ceil_div(params.seqlen_k, kDecodeStep), 1);
}

struct Split {
  std::int64_t num_tiles, num_row_tiles, num_shares;
  std::int64_t fan_in, num_partials, num_semaphores;  // of a tile
  PartialShape partial;

  std::int64_t num_values() const {
    return num_tiles * num_partials * (partial.bytes / static_cast<std::int64_t>(sizeof(float)));
  }
};

// What num_splits shares of the keys stand for.
Split split_of(const AttentionParams& params) {
  const std::int64_t num_rows = num_rows_of(params);
  Split split{};
  split.num_row_tiles = ceil_div(num_rows, 16 * num_groups_of(num_rows));
  split.num_tiles = static_cast<std::int64_t>(params.batch) * params.num_kv_heads * split.num_row_tiles;
  split.partial = partial_shape_of(params);
  // A share beyond the number of steps would have no keys, and add nothing but its partial result.
  split.num_shares = std::min<std::int64_t>(params.num_splits, num_steps_of(params));
  if (split.num_tiles == 0) return split;
  split.fan_in = fan_in_of(split.num_shares, split.partial.max_fan_in);
  for_each_level(split.num_shares, split.fan_in, [&](std::int64_t parts, std::int64_t groups) {
    split.num_partials += parts;
    split.num_semaphores += groups;
  });
  return split;
}

struct Choice {
  std::int64_t num_shares;
  double cost;
};

Choice choose_shares(const AttentionParams& params, const Slots& slots) {
  const std::int64_t num_rows = num_rows_of(params), num_steps = num_steps_of(params);
  const std::int64_t num_tiles =
      static_cast<std::int64_t>(params.batch) * params.num_kv_heads * ceil_div(num_rows, 16 * num_groups_of(num_rows));
  if (num_tiles == 0) return {1, 0.0};
  const PartialShape partial = partial_shape_of(params);
  const auto cost_of = [&](std::int64_t num_shares) {
    return cost_of_waves(num_tiles, num_steps, num_shares, slots) + cost_of_levels(num_shares, partial);
  };
  Choice best{1, cost_of(1)};
  // With many tiles a few shares still even out the last wave; with few tiles, as many as make one wave. Large numbers
  // need not be tried one by one: each stands for the smallest that gives shares of the same length.
  const std::int64_t max_shares = std::min(num_steps, std::max<std::int64_t>(kFanIn, slots.num_blocks / num_tiles));
  for (std::int64_t candidate = 2; candidate <= max_shares; candidate += 1 + candidate / 16) {
    const std::int64_t num_shares = ceil_div(num_steps, ceil_div(num_steps, candidate));
    if (const double cost = cost_of(num_shares); cost < best.cost) best = {num_shares, cost};
  }
  return best;
}

// Partial results are read in chunks.
void check_workspace(const AttentionWorkspace& workspace, std::int64_t num_values, std::int64_t num_semaphores) {
  if (workspace.num_values < num_values || workspace.num_semaphores < num_semaphores ||
      reinterpret_cast<std::uintptr_t>(workspace.values) % kChunkBytes != 0) {
    throw std::invalid_argument(std::string(kKernel) + ": the workspace must have " + std::to_string(num_values) +
                                " values, aligned to 16 bytes, and " + std::to_string(num_semaphores) +
                                " semaphores, got " + std::to_string(workspace.num_values) + " and " +
                                std::to_string(workspace.num_semaphores) + "; size it on the device of the call");
  }
}

template <typename T, int kHeadDim, int kGroups>
void launch(const AttentionParams& params, const DecodePlan& plan, std::int64_t num_blocks, CUstream_st* stream) {
  using Tiles = DecodeTiles<kHeadDim, kGroups>;
  const auto kernel = &attention_decode_kernel<T, kHeadDim, kGroups>;
  const Launch launch{kKernel, checked_grid(params, kKernel, num_blocks), kDecodeThreads, Tiles::kBytes};
  allow_shared_bytes(kernel, launch);
  kernel<<<launch.num_blocks, dim3(kWarpLanes, kDecodeWarps), launch.shared_bytes, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
}

}  // namespace

int choose_num_splits(const AttentionParams& params) {
  if (params.num_splits != 0) return params.num_splits;
  const std::int64_t num_rows = num_rows_of(params);
  if (num_rows > kMaxRows) return kNotSplit;
  const Slots slots = count_slots();
  // A step of the prefill kernel, 64 keys for 128 rows, is about as long: its products take the time that a step of
  // this kernel needs for memory. But beyond 128 rows it reads a key less often, so the gain here must be a clear one.
  const std::int64_t prefill_tiles =
      static_cast<std::int64_t>(params.batch) * params.num_heads * ceil_div(params.seqlen_q, kPrefillRows);
  const double prefill_cost = cost_of_waves(prefill_tiles, ceil_div(params.seqlen_k, kDecodeStep), 1, slots);
  const Choice choice = choose_shares(params, slots);
  const double cost = choice.cost * (num_rows <= kPrefillRows ? 1.0 : 2.0);
  return cost <= prefill_cost ? static_cast<int>(choice.num_shares) : kNotSplit;
}

AttentionWorkspace attention_decode_workspace(const AttentionParams& params) {
  const Split split = split_of(params);
  return {nullptr, nullptr, split.num_values(), split.num_tiles * split.num_semaphores, params.num_splits};
}

void attention_decode(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream) {
  const Split split = split_of(params);
  if (split.num_tiles == 0) return;
  check_workspace(workspace, split.num_values(), split.num_tiles * split.num_semaphores);

  DecodePlan plan{};
  plan.partials = reinterpret_cast<unsigned char*>(workspace.values);
  plan.semaphores = reinterpret_cast<unsigned*>(workspace.semaphores);
  plan.num_rows = static_cast<int>(num_rows_of(params));
  plan.group = params.num_heads / params.num_kv_heads;
  plan.num_row_tiles = static_cast<int>(split.num_row_tiles);
  plan.num_shares = static_cast<int>(split.num_shares);
  plan.num_partials = static_cast<int>(split.num_partials);
  plan.num_semaphores = static_cast<int>(split.num_semaphores);
  plan.fan_in = static_cast<int>(split.fan_in);
  plan.partial_rows = split.partial.rows;
  plan.scale2 = scale2_of(params);
  plan.inverse_scale = 1.0f / params.softmax_scale;
  plan.in_chunks = in_chunks(params);

  const std::int64_t num_blocks = split.num_tiles * split.num_shares;
  dispatch_attention(params, [&](auto dtype, auto head_dim) {
    using T = typename decltype(dtype)::type;
    if (num_groups_of(num_rows_of(params)) == 1) {
      launch<T, head_dim(), 1>(params, plan, num_blocks, stream);
    } else {
      launch<T, head_dim(), 2>(params, plan, num_blocks, stream);
    }
  });
}

}  // namespace andromeda::cuda
