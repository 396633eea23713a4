// attention, backward, on Hopper: which calls run here, and the launch of the first pass
// (attention_backward_dq.cuh). attention_backward_dkdv.cu launches the second one.
#include <cstdint>

#include "attention/launch.h"
#include "hopper/attention_backward.h"
#include "hopper/attention_backward_dq.cuh"
#include "hopper/device.h"
#include "hopper/tensor_map.h"

namespace andromeda::cuda::hopper {
namespace {

template <typename T, int kHeadDim>
void launch_dq(const AttentionBackwardParams& params, const BackwardPlan& plan, CUstream_st* stream) {
  const AttentionParams& forward = params.forward;
  const TensorShape queries = shape_of_queries(forward), keys = shape_of_keys(forward);
  const DqMaps maps{{make_tensor_map(forward.q, forward.q_stride, queries, kQueryRows),
                     make_tensor_map(params.dout, params.dout_stride, queries, kQueryRows)},
                    {make_tensor_map(forward.k, forward.k_stride, keys, kDqKeys),
                     make_tensor_map(forward.v, forward.v_stride, keys, kDqKeys)}};
  const std::int64_t num_blocks = static_cast<std::int64_t>(forward.batch) * forward.num_heads * plan.num_query_blocks;
  const Launch launch{"attention_backward_dq", checked_grid(forward, "attention_backward_dq", num_blocks), kDqThreads,
                      kDqSharedBytes<kHeadDim>};
  const auto kernel = attention_backward_dq_wgmma_kernel<T, kHeadDim>;
  allow_shared_bytes(kernel, launch);
  kernel<<<launch.num_blocks, launch.num_threads, launch.shared_bytes, stream>>>(params, plan, maps);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
}

}  // namespace

bool takes_attention_backward(const AttentionBackwardParams& params) {
  const AttentionParams& forward = params.forward;
  const TensorShape queries = shape_of_queries(forward), keys = shape_of_keys(forward);
  return is_current_device({"attention_backward", 0, kDqThreads, 0}) &&
         has_tensor_map(forward.q, forward.q_stride, queries) && has_tensor_map(forward.k, forward.k_stride, keys) &&
         has_tensor_map(forward.v, forward.v_stride, keys) &&
         has_tensor_map(params.dout, params.dout_stride, queries) &&
         is_aligned16(forward.out, forward.out_stride, forward.batch, forward.seqlen_q, forward.num_heads);
}

void launch_attention_backward_dq(const AttentionBackwardParams& params, const BackwardPlan& plan,
                                  CUstream_st* stream) {
  dispatch_attention(params.forward, [&](auto dtype, auto head_dim) {
    launch_dq<typename decltype(dtype)::type, head_dim()>(params, plan, stream);
  });
}

}  // namespace andromeda::cuda::hopper
