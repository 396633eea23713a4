// Attention forward on the GPU: checks, the choice between its two kernels, and the launch of the one for many query
// rows (forward.cuh). decode.cu launches the other one.
//
// The tensors' device must be the current one. A call allocates nothing and waits for nothing: it can be captured.
#include "attention/forward.cuh"
#include "attention/launch.h"

namespace andromeda::cuda {
namespace {

constexpr const char* kName = "attention_forward";

template <typename T, int kHeadDim>
void launch(const AttentionParams& params, CUstream_st* stream) {
  const std::int64_t query_tiles = ceil_div(params.seqlen_q, kForwardQueries);
  const std::int64_t num_blocks = query_tiles * params.batch * params.num_heads;
  if (num_blocks == 0) return;
  const ForwardPlan plan = {softmax_scale_log2_of(params), static_cast<int>(query_tiles), is_aligned16(params)};
  const Launch launch = {kName, checked_grid(params, kName, num_blocks), kForwardThreads,
                         kForwardSharedBytes<kHeadDim>};
  const auto kernel = attention_forward_kernel<T, kHeadDim>;
  allow_shared_bytes(kernel, launch);
  kernel<<<launch.num_blocks, launch.num_threads, launch.shared_bytes, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
}

AttentionParams with_choice(AttentionParams params) {
  params.num_splits = choose_num_splits(params);
  return params;
}

}  // namespace

AttentionWorkspace attention_forward_workspace(const AttentionParams& params) {
  check_attention(params, kName);
  const AttentionParams chosen = with_choice(params);
  AttentionWorkspace workspace{};
  if (chosen.num_splits > 0) workspace = attention_decode_workspace(chosen);
  workspace.num_splits = chosen.num_splits;
  return workspace;
}

void attention_forward(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream) {
  check_attention(params, kName);
  check_softmax_scale(params, kName);
  const AttentionParams chosen = with_choice(params);
  if (chosen.num_splits > 0) return attention_decode(chosen, workspace, stream);
  if (params.num_keys != nullptr) {
    throw std::invalid_argument(std::string(kName) + ": num_splits must be positive with num_keys, got " +
                                std::to_string(params.num_splits));
  }
  dispatch_attention(
      params, [&](auto dtype, auto head_dim) { launch<typename decltype(dtype)::type, head_dim()>(params, stream); });
}

}  // namespace andromeda::cuda
