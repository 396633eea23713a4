// Attention forward on Hopper (attention_forward.cuh): checks, tensor maps and launch.
#include <algorithm>

#include "attention/launch.h"
#include "hopper/attention_forward.cuh"
#include "hopper/attention_forward.h"
#include "hopper/device.h"
#include "hopper/tensor_map.h"

namespace andromeda::cuda::hopper {
namespace {

constexpr const char* kName = "attention_forward";

template <typename T, int kHeadDim>
void launch(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream) {
  using Shape = ForwardShape<kHeadDim>;
  constexpr int kQueries = kForwardQueries<kHeadDim>;
  const std::int64_t query_tiles = ceil_div(params.seqlen_q, kQueries);
  const std::int64_t num_items = query_tiles * params.batch * params.num_heads;
  if (num_items == 0) return;
  Launch launch = {kName, checked_grid(params, kName, num_items), kForwardThreads<kHeadDim>,
                   ForwardTiles<kHeadDim>::kBytes};
  launch.num_blocks = std::min(launch.num_blocks, static_cast<unsigned>(count_multiprocessors(launch)));
  if (workspace.num_semaphores < kForwardSemaphores || workspace.semaphores == nullptr) {
    throw std::invalid_argument(std::string(kName) + ": the workspace must have " + std::to_string(kForwardSemaphores) +
                                " semaphore, got " + std::to_string(workspace.num_semaphores) +
                                "; size it on the device of the call");
  }
  const ForwardPlan plan = {
      softmax_scale_log2_of(params),
      1.0f / params.softmax_scale,
      static_cast<int>(query_tiles),
      static_cast<int>(num_items),
      launch.num_blocks,
      reinterpret_cast<unsigned*>(workspace.semaphores),
      is_aligned16(params.out, params.out_stride, params.batch, params.seqlen_q, params.num_heads)};
  const CUtensorMap q_map = make_tensor_map(params.q, params.q_stride, shape_of_queries(params), kQueries);
  const CUtensorMap k_map = make_tensor_map(params.k, params.k_stride, shape_of_keys(params), Shape::kKeys);
  const CUtensorMap v_map = make_tensor_map(params.v, params.v_stride, shape_of_keys(params), Shape::kKeys);
  const auto kernel = attention_forward_wgmma_kernel<T, kHeadDim>;
  allow_shared_bytes(kernel, launch);
  kernel<<<launch.num_blocks, launch.num_threads, launch.shared_bytes, stream>>>(params, plan, q_map, k_map, v_map);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
}

}  // namespace

bool attention_forward_has_shape(const AttentionParams& params) {
  return is_current_device({kName, 0, 0, 0}) && params.head_dim % kVec16Width<std::uint16_t> == 0 &&
         params.num_keys == nullptr;
}

bool attention_forward_has_tensors(const AttentionParams& params) {
  return has_tensor_map(params.q, params.q_stride, shape_of_queries(params)) &&
         has_tensor_map(params.k, params.k_stride, shape_of_keys(params)) &&
         has_tensor_map(params.v, params.v_stride, shape_of_keys(params));
}

void attention_forward(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream) {
  const auto with_head_dim = [&](auto dtype, auto head_dim) {
    launch<typename decltype(dtype)::type, head_dim()>(params, workspace, stream);
  };
  if (params.head_dim <= kMaxAttentionHeadDim) return dispatch_attention(params, with_head_dim);
  dispatch_half_precision(params,
                          [&](auto dtype) { with_head_dim(dtype, std::integral_constant<int, kMaxForwardHeadDim>{}); });
}

}  // namespace andromeda::cuda::hopper
