// attention, backward, on Hopper: the launch of the second pass, dk and dv. The kernel is in attention_backward_dkdv.cuh.
#include <cstdint>

#include "attention/launch.h"
#include "check.cuh"
#include "hopper/attention_backward.h"
#include "hopper/attention_backward_dkdv.cuh"
#include "hopper/tensor_map.h"

namespace andromeda::cuda::hopper {
namespace {

KeyGradientMaps maps_of(const AttentionBackwardParams& params) {
  const AttentionParams& forward = params.forward;
  const TensorShape queries = shape_of_queries(forward), keys = shape_of_keys(forward);
  return {make_tensor_map(forward.q, forward.q_stride, queries, kBackwardTile),
          make_tensor_map(forward.k, forward.k_stride, keys, kKeyRows),
          make_tensor_map(forward.v, forward.v_stride, keys, kKeyRows),
          make_tensor_map(params.dout, params.dout_stride, queries, kBackwardTile)};
}

}  // namespace

void launch_attention_backward_dkdv(const AttentionBackwardParams& params, const BackwardPlan& plan,
                                    CUstream_st* stream) {
  const AttentionParams& forward = params.forward;
  const std::int64_t num_blocks = static_cast<std::int64_t>(forward.batch) * forward.num_kv_heads *
                                  ceil_div(forward.seqlen_k, kKeyRows) * plan.num_head_splits;
  dispatch_attention(forward, [&](auto dtype, auto head_dim) {
    using T = typename decltype(dtype)::type;
    constexpr const char* kName = "attention_backward_dkdv";
    const Launch launch{kName, checked_grid(forward, kName, num_blocks), kKeyThreads, kKeySharedBytes<head_dim()>};
    const auto kernel = attention_backward_dkdv_wgmma_kernel<T, head_dim()>;
    allow_shared_bytes(kernel, launch);
    kernel<<<launch.num_blocks, launch.num_threads, launch.shared_bytes, stream>>>(params, plan, maps_of(params));
    ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
  });
}

}  // namespace andromeda::cuda::hopper
