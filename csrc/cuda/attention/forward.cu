// Attention forward on the GPU: checks, the choice between its kernels, and the launch of the one for many query rows on
// every device (forward.cuh). decode.cu launches the one for few, hopper/attention_forward.cu the one for Hopper.
//
// The tensors' device must be the current one. A call allocates nothing and waits for nothing: it can be captured.
#include "attention/forward.cuh"
#include "attention/launch.h"
#ifdef ANDROMEDA_HOPPER
#include "hopper/attention_forward.h"
#include "hopper/device.h"
#endif

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

// Whether the kernel for Hopper can run a call for many query rows on the current device, as far as shapes say.
bool is_for_hopper([[maybe_unused]] const AttentionParams& params) {
#ifdef ANDROMEDA_HOPPER
  return hopper::attention_forward_has_shape(params);
#else
  return false;
#endif
}

// Runs that kernel, unless TMA cannot copy the tensors.
bool ran_on_hopper([[maybe_unused]] const AttentionParams& params, [[maybe_unused]] const AttentionWorkspace& workspace,
                   [[maybe_unused]] CUstream_st* stream) {
#ifdef ANDROMEDA_HOPPER
  if (!is_for_hopper(params) || !hopper::attention_forward_has_tensors(params)) return false;
  hopper::attention_forward(params, workspace, stream);
  return true;
#else
  return false;
#endif
}

// The call with its choice of num_splits.
AttentionParams checked(AttentionParams params) {
  const bool is_wide = params.head_dim > kMaxAttentionHeadDim;
  check_attention(params, kName, is_wide ? attention_forward_max_head_dim() : kMaxAttentionHeadDim);
  if (is_wide && (params.num_splits > 0 || !is_for_hopper(params))) {
    throw std::invalid_argument(std::string(kName) + ": head_dim above " + std::to_string(kMaxAttentionHeadDim) +
                                " must be a multiple of 8, without num_keys and splits of the keys, got " +
                                std::to_string(params.head_dim) + ", num_splits " + std::to_string(params.num_splits));
  }
  params.num_splits = is_wide ? kNotSplit : choose_num_splits(params);
  return params;
}

}  // namespace

int attention_forward_max_head_dim() {
#ifdef ANDROMEDA_HOPPER
  if (hopper::is_current_device({kName, 0, 0, 0})) return hopper::kMaxForwardHeadDim;
#endif
  return kMaxAttentionHeadDim;
}

AttentionWorkspace attention_forward_workspace(const AttentionParams& params) {
  const AttentionParams chosen = checked(params);
  AttentionWorkspace workspace{};
  if (chosen.num_splits > 0) workspace = attention_decode_workspace(chosen);
#ifdef ANDROMEDA_HOPPER
  if (chosen.num_splits == kNotSplit && is_for_hopper(params)) {
    workspace.num_semaphores = hopper::kForwardSemaphores;
  }
#endif
  workspace.num_splits = chosen.num_splits;
  return workspace;
}

void attention_forward(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream) {
  const AttentionParams chosen = checked(params);
  check_softmax_scale(params, kName);
  if (chosen.num_splits > 0) return attention_decode(chosen, workspace, stream);
  if (params.num_keys != nullptr) {
    throw std::invalid_argument(std::string(kName) + ": num_splits must be positive with num_keys, got " +
                                std::to_string(params.num_splits));
  }
  if (ran_on_hopper(params, workspace, stream)) return;
  if (params.head_dim > kMaxAttentionHeadDim) {
    throw std::invalid_argument(std::string(kName) + ": with head_dim above " + std::to_string(kMaxAttentionHeadDim) +
                                " rows of q, k and v must start at multiples of 16 bytes, and no stride may be 0; "
                                "pass contiguous tensors");
  }
  dispatch_attention(
      params, [&](auto dtype, auto head_dim) { launch<typename decltype(dtype)::type, head_dim()>(params, stream); });
}

}  // namespace andromeda::cuda
