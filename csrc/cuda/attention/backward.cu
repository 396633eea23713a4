// attention, backward, on the GPU: checks, the workspace, the splits of the query heads, dispatch and launches. The
// kernels are in backward_dq.cuh and backward_dkdv.cuh; Hopper has its own for tensors that TMA can copy.
//
// The tensors' device must be the current one. A call allocates nothing and waits for nothing: it can be captured.
#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "attention/backward.cuh"
#include "attention/backward_dkdv.cuh"
#include "attention/backward_dq.cuh"
#include "attention/launch.h"
#ifdef ANDROMEDA_HOPPER
#include "hopper/attention_backward.h"
#endif

namespace andromeda::cuda {
namespace {

constexpr const char* kName = "attention_backward";
// Blocks per multiprocessor that the dk, dv kernel should have: two are resident at a time, and two rounds balance
// their work, which differs with masks and windows.
constexpr int kBlocksPerMultiprocessor = 4;

std::int64_t num_key_tiles(const AttentionParams& params) { return ceil_div(params.seqlen_k, kBackwardTile); }

// The number of equal splits of the query heads of a key head: the smallest divisor that fills the device.
int num_head_splits_of(const AttentionParams& params) {
  const Launch launch{kName, 0, kBackwardThreads, 0};
  const std::int64_t wanted = std::int64_t{count_multiprocessors(launch)} * kBlocksPerMultiprocessor;
  const std::int64_t num_blocks = num_key_tiles(params) * params.batch * params.num_kv_heads;
  const int qhead_per_kvhead = params.num_heads / params.num_kv_heads;
  if (num_blocks == 0 || qhead_per_kvhead == 0) return 1;
  int num_head_splits = 1;
  while (num_head_splits < qhead_per_kvhead &&
         (qhead_per_kvhead % num_head_splits != 0 || num_head_splits * num_blocks < wanted))
    ++num_head_splits;
  return num_head_splits;
}

// The workspace in floats: query tiles, partials, key ranges.
struct Layout {
  std::int64_t partials, key_ranges, size;
  int num_query_tiles, num_head_splits;
};

Layout lay_out(const AttentionParams& params) {
  static_assert(sizeof(QueryTile) % kVec16Bytes == 0, "the partials that follow are read in vectors");
  Layout layout{};
  layout.num_query_tiles = static_cast<int>(ceil_div(params.seqlen_q, kBackwardTile));
  layout.num_head_splits = num_head_splits_of(params);
  const std::int64_t num_tiles = static_cast<std::int64_t>(params.batch) * params.num_heads * layout.num_query_tiles;
  const std::int64_t num_elements = static_cast<std::int64_t>(params.batch) * params.seqlen_k * params.num_kv_heads *
                                    built_head_dim(params);  // of dk or dv
  layout.partials = num_tiles * static_cast<std::int64_t>(sizeof(QueryTile) / sizeof(float));
  layout.key_ranges = layout.partials + (layout.num_head_splits == 1 ? 0 : 2 * layout.num_head_splits * num_elements);
  layout.size = layout.key_ranges + num_tiles * static_cast<std::int64_t>(sizeof(KeyRange) / sizeof(float));
  return layout;
}

BackwardPlan plan_of(const AttentionBackwardParams& params, const AttentionWorkspace& workspace) {
  const AttentionParams& forward = params.forward;
  const Layout layout = lay_out(forward);
  if (workspace.num_partials < layout.size) {
    throw std::invalid_argument(std::string(kName) + ": the workspace must hold " + std::to_string(layout.size) +
                                " values, got " + std::to_string(workspace.num_partials));
  }
  if (reinterpret_cast<std::uintptr_t>(workspace.partials) % kVec16Bytes != 0) {
    throw std::invalid_argument(std::string(kName) + ": the workspace must start at a multiple of 16 bytes");
  }
  BackwardPlan plan{};
  plan.tiles = reinterpret_cast<QueryTile*>(workspace.partials);
  plan.partials = workspace.partials + layout.partials;
  plan.key_ranges = reinterpret_cast<KeyRange*>(workspace.partials + layout.key_ranges);
  plan.num_query_tiles = layout.num_query_tiles;
  plan.num_query_blocks = static_cast<int>(ceil_div(forward.seqlen_q, kQueryRows));
  plan.num_head_splits = layout.num_head_splits;
  plan.softmax_scale_log2 = softmax_scale_log2_of(forward);
  const auto fits = [&](const void* data, const SeqStrides& stride, int seqlen, int num_heads) {
    return is_aligned16(data, stride, forward.batch, seqlen, num_heads);
  };
  plan.is_aligned16 = is_aligned16(forward) &&
                      fits(params.dout, params.dout_stride, forward.seqlen_q, forward.num_heads) &&
                      fits(params.dq, params.dq_stride, forward.seqlen_q, forward.num_heads) &&
                      fits(params.dk, params.dk_stride, forward.seqlen_k, forward.num_kv_heads) &&
                      fits(params.dv, params.dv_stride, forward.seqlen_k, forward.num_kv_heads);
  return plan;
}

using Kernel = void(AttentionBackwardParams, BackwardPlan);

void launch(Kernel* kernel, const char* name, std::int64_t num_blocks, int num_threads, int shared_bytes,
            const AttentionBackwardParams& params, const BackwardPlan& plan, CUstream_st* stream) {
  if (num_blocks == 0) return;
  const Launch launch{name, checked_grid(params.forward, name, num_blocks), static_cast<unsigned>(num_threads),
                      static_cast<std::size_t>(shared_bytes)};
  allow_shared_bytes(kernel, launch);
  kernel<<<launch.num_blocks, launch.num_threads, launch.shared_bytes, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
}

// Whether a multiprocessor holds as many blocks of the dq kernel with two stages of keys as with one: on 9.0, and
// on 8.6 and 8.9, which hold one block either way; not on 8.0.
template <int kHeadDim>
bool two_stages_cost_no_block() {
  const Launch launch{"attention_backward_dq", 0, kBackwardThreads, 0};
  int device = 0, available = 0, reserved = 0;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&reserved, cudaDevAttrReservedSharedMemoryPerBlock, device), launch);
  const auto num_blocks = [&](int shared_bytes) {
    const int static_bytes = kQueryRows * static_cast<int>(sizeof(VisibleKeys));
    return std::min(kBackwardBlocksPerSm<kHeadDim>, available / (shared_bytes + static_bytes + reserved));
  };
  return num_blocks(kQuerySharedBytes<kHeadDim, 2>) >= num_blocks(kQuerySharedBytes<kHeadDim, 1>);
}

template <typename T, int kHeadDim, int kStages>
void launch_dq(const AttentionBackwardParams& params, const BackwardPlan& plan, CUstream_st* stream) {
  const std::int64_t heads = static_cast<std::int64_t>(params.forward.batch) * params.forward.num_heads;
  launch(attention_backward_dq_kernel<T, kHeadDim, kStages>, "attention_backward_dq", heads * plan.num_query_blocks,
         kBackwardThreads, kQuerySharedBytes<kHeadDim, kStages>, params, plan, stream);
}

template <typename T, int kHeadDim>
void launch_passes(const AttentionBackwardParams& params, const BackwardPlan& plan, CUstream_st* stream) {
  const AttentionParams& forward = params.forward;
  const std::int64_t kv_heads = static_cast<std::int64_t>(forward.batch) * forward.num_kv_heads;
  if constexpr (kHeadDim == 64) {  // two stages fit everywhere
    launch_dq<T, kHeadDim, 2>(params, plan, stream);
  } else if (two_stages_cost_no_block<kHeadDim>()) {
    launch_dq<T, kHeadDim, 2>(params, plan, stream);
  } else {
    launch_dq<T, kHeadDim, 1>(params, plan, stream);
  }
  launch(attention_backward_dkdv_kernel<T, kHeadDim>, "attention_backward_dkdv",
         kv_heads * num_key_tiles(forward) * plan.num_head_splits, kBackwardThreads, kKeySharedBytes<kHeadDim>, params,
         plan, stream);
}

template <typename T, int kHeadDim>
void launch_sum(const AttentionBackwardParams& params, const BackwardPlan& plan, CUstream_st* stream) {
  if (plan.num_head_splits == 1) return;
  const AttentionParams& forward = params.forward;
  const std::int64_t kv_heads = static_cast<std::int64_t>(forward.batch) * forward.num_kv_heads;
  const std::int64_t num_vecs = 2 * kv_heads * forward.seqlen_k * (kHeadDim / kVec16Width<T>);
  launch(attention_backward_sum_kernel<T, kHeadDim>, "attention_backward_sum", ceil_div(num_vecs, kSumThreads),
         kSumThreads, 0, params, plan, stream);
}

// Both passes by the kernels for Hopper, if they take the call.
bool launch_on_hopper([[maybe_unused]] const AttentionBackwardParams& params, [[maybe_unused]] const BackwardPlan& plan,
                      [[maybe_unused]] CUstream_st* stream) {
#ifdef ANDROMEDA_HOPPER
  if (!hopper::takes_attention_backward(params)) return false;
  hopper::launch_attention_backward_dq(params, plan, stream);
  hopper::launch_attention_backward_dkdv(params, plan, stream);
  return true;
#else
  return false;
#endif
}

}  // namespace

AttentionWorkspace attention_backward_workspace(const AttentionParams& params) {
  check_attention(params, kName);
  return {nullptr, nullptr, lay_out(params).size, 0, 0};
}

void attention_backward(const AttentionBackwardParams& params, const AttentionWorkspace& workspace,
                        CUstream_st* stream) {
  check_attention(params.forward, kName);
  check_softmax_scale(params.forward, kName);
  const BackwardPlan plan = plan_of(params, workspace);
  const bool is_on_hopper = launch_on_hopper(params, plan, stream);
  dispatch_attention(params.forward, [&](auto dtype, auto head_dim) {
    using T = typename decltype(dtype)::type;
    if (!is_on_hopper) launch_passes<T, head_dim()>(params, plan, stream);
    launch_sum<T, head_dim()>(params, plan, stream);
  });
}

}  // namespace andromeda::cuda
