// The launch of the decode kernel with clusters (attention_decode.cuh). attention/decode.cu plans it.
#include "attention/launch.h"
#include "check.cuh"
#include "hopper/attention_decode.cuh"
#include "hopper/attention_decode.h"

namespace andromeda::cuda::hopper {
namespace {

template <typename T, int kHeadDim, int kRowTiles>
void launch(const AttentionParams& params, const DecodePlan& plan, unsigned num_blocks, CUstream_st* stream) {
  using Tiles = DecodeTiles<kHeadDim, kRowTiles>;
  const auto kernel = &attention_decode_cluster_kernel<T, kHeadDim, kRowTiles>;
  const Launch launch{"attention_decode", num_blocks, kDecodeThreads, Tiles::kBytes};
  allow_shared_bytes(kernel, launch);
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {1u << plan.cluster_size_log2, 1, 1};
  // A block has a multiprocessor for itself, as long as there are enough.
  attributes[1].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
  attributes[1].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicySpread;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(num_blocks);
  config.blockDim = dim3(kWarpLanes, kDecodeWarps);
  config.dynamicSmemBytes = launch.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  ANDROMEDA_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params, plan), launch);
}

}  // namespace

void launch_attention_decode(const AttentionParams& params, const DecodePlan& plan, int num_row_tiles,
                             unsigned num_blocks, CUstream_st* stream) {
  dispatch_attention(params, [&](auto dtype, auto head_dim) {
    using T = typename decltype(dtype)::type;
    if (num_row_tiles == 1) {
      launch<T, head_dim(), 1>(params, plan, num_blocks, stream);
    } else {
      launch<T, head_dim(), 2>(params, plan, num_blocks, stream);
    }
  });
}

}  // namespace andromeda::cuda::hopper
