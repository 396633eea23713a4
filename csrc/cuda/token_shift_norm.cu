// token_shift_norm on the GPU: checks, the plan of the grid, dispatch and launch. The kernels are in
// token_shift_norm.cuh.
//
// The tensors' device must be the current one. A call allocates nothing and waits for nothing: it can be captured.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "alignment.h"
#include "andromeda/dispatch.h"
#include "andromeda/integers.h"
#include "check.cuh"
#include "token_shift_norm.cuh"

namespace andromeda::cuda {
namespace {

// Rows that a group normalises one after the other when nothing else fixes the length of a run: more of them amortise
// the start of a block, which helps only once every multiprocessor has blocks. Two were best on an H200 (dim 2560:
// 172 us, against 174 with one, 177 with four and 185 with eight).
constexpr int kMaxRowsPerGroup = 2;
constexpr int kManyBlocks = 2048;
constexpr int kMaxRunLength = 1 << 30;  // tokens: they are counted in an int, a few steps past the end
static_assert(kMaxRunLength <= INT_MAX - 2 * kSharedRowLanes);

int ceil_log2(std::int64_t value) {
  int log2 = 0;
  while (std::int64_t{1} << log2 < value) ++log2;
  return log2;
}

void check(const TokenShiftNormParams& params) {
  if (params.shift < 0 || params.shift >= params.dim) {
    throw std::invalid_argument("token_shift_norm: shift must be at least 0 and less than dim=" +
                                std::to_string(params.dim) + ", got " + std::to_string(params.shift));
  }
}

// Whether every row of a tensor starts at a multiple of 16 bytes; true without a tensor.
template <typename T>
bool has_aligned_rows(const void* data, const RowStrides& stride, int batch, int seqlen) {
  return data == nullptr || is_aligned16<T>(data, {{batch, stride.batch}, {seqlen, stride.seq}});
}

template <typename T>
bool all_aligned16(const TokenShiftNormParams& params) {
  const int batch = params.batch, seqlen = params.seqlen;
  return params.dim % kVec16Width<T> == 0 && has_aligned_rows<T>(params.x, params.x_stride, batch, seqlen) &&
         has_aligned_rows<T>(params.residual, params.residual_stride, batch, seqlen) &&
         has_aligned_rows<T>(params.history, params.history_stride, batch, params.shift) &&
         has_aligned_rows<T>(params.y, params.y_stride, batch, seqlen) &&
         has_aligned_rows<T>(params.shifted, params.shifted_stride, batch, seqlen) &&
         is_aligned16(params.residual_scale) && is_aligned16(params.gamma);
}

template <typename T>
bool all_aligned16(const TokenShiftNormBackwardParams& params) {
  const int batch = params.forward.batch, seqlen = params.forward.seqlen;
  return all_aligned16<T>(params.forward) && has_aligned_rows<T>(params.dy, params.dy_stride, batch, seqlen) &&
         has_aligned_rows<T>(params.dshifted, params.dshifted_stride, batch, seqlen) &&
         has_aligned_rows<T>(params.dx, params.dx_stride, batch, seqlen) &&
         has_aligned_rows<T>(params.dresidual, params.dresidual_stride, batch, seqlen) &&
         is_aligned16(params.dresidual_scale_partial) && is_aligned16(params.dgamma_partial);
}

Channels channels_of(std::int64_t count) { return {static_cast<float>(count), 1.0f / static_cast<float>(count)}; }

Segments segments_of(const TokenShiftNormParams& params) {
  const std::int64_t width = params.dim / (params.shift + 1);
  const int bits = ceil_log2(width);
  return {static_cast<unsigned>(ceil_div(std::int64_t{1} << (31 + bits), width)), bits, params.shift};
}

// num_runs == 0: as many runs as keep the device busy.
template <typename T, Access kAccess>
RowPlan plan_rows(const TokenShiftNormParams& params, std::int64_t num_runs) {
  RowPlan plan{};
  plan.num_tokens = static_cast<std::int64_t>(params.batch) * params.seqlen;
  const std::int64_t lanes = ceil_div(params.dim, kLaneChannels<T, kAccess>);
  plan.warp_lanes_log2 = std::min(ceil_log2(lanes), ceil_log2(kWarpLanes));
  plan.num_lanes = lanes <= kWarpLanes ? 1 << plan.warp_lanes_log2
                                       : static_cast<int>(std::min<std::int64_t>(
                                             ceil_div(lanes, kWarpLanes) * kWarpLanes, kMaxRowLanes<T, kAccess>));
  plan.num_groups = std::max(kSharedRowLanes / plan.num_lanes, 1);
  plan.step_batch = plan.num_groups / std::max(params.seqlen, 1);
  plan.step_seq = plan.num_groups % std::max(params.seqlen, 1);
  const std::int64_t tile = plan.num_lanes * kLaneChannels<T, kAccess>;
  plan.num_tiles = static_cast<int>(ceil_div(params.dim, tile));
  plan.tile = channels_of(tile);
  plan.last_tile = channels_of(params.dim - (plan.num_tiles - 1) * tile);
  plan.row = channels_of(params.dim);
  plan.segments = segments_of(params);

  if (num_runs == 0) {
    const std::int64_t rows = plan.num_tokens / (static_cast<std::int64_t>(plan.num_groups) * kManyBlocks);
    const std::int64_t length = plan.num_groups * std::clamp<std::int64_t>(rows, 1, kMaxRowsPerGroup);
    num_runs = std::clamp<std::int64_t>(ceil_div(plan.num_tokens, length), 1, INT_MAX);
  }
  const std::int64_t run_length = ceil_div(plan.num_tokens, num_runs);
  if (run_length > kMaxRunLength) {
    throw std::invalid_argument("token_shift_norm: batch * seqlen must be at most " + std::to_string(kMaxRunLength) +
                                " for each of the " + std::to_string(num_runs) + " runs of tokens, got " +
                                std::to_string(plan.num_tokens));
  }
  plan.num_runs = static_cast<int>(num_runs);
  plan.run_length = static_cast<int>(run_length);
  return plan;
}

template <typename T, Access kAccess>
void launch(const TokenShiftNormParams& params, CUstream_st* stream) {
  const RowPlan plan = plan_rows<T, kAccess>(params, 0);
  const unsigned num_blocks = plan.num_runs, num_threads = plan.num_groups * plan.num_lanes;
  token_shift_norm_forward_kernel<T, kAccess><<<num_blocks, num_threads, 0, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), (Launch{"token_shift_norm_forward", num_blocks, num_threads, 0}));
}

// Returns the kernel, with permission for the shared memory of its longest rows. Sets launch.shared_bytes for
// launch.num_threads.
template <typename T, Access kAccess>
auto staged_kernel(Launch& launch) {
  const auto kernel = &token_shift_norm_backward_kernel<T, kAccess>;
  launch.shared_bytes = kMaxRowLanes<T, kAccess> * kStagedBytes<kAccess>;
  allow_shared_bytes(kernel, launch);
  launch.shared_bytes = launch.num_threads * kStagedBytes<kAccess>;
  return kernel;
}

template <typename T, Access kAccess>
void launch(const TokenShiftNormBackwardParams& params, CUstream_st* stream) {
  const bool summed = params.dresidual_scale_partial != nullptr || params.dgamma_partial != nullptr;
  if (summed && params.num_partials < 1) {
    throw std::invalid_argument("token_shift_norm: num_partials must be positive, got " +
                                std::to_string(params.num_partials));
  }
  const RowPlan plan = plan_rows<T, kAccess>(params.forward, summed ? params.num_partials : 0);
  Launch launch{"token_shift_norm_backward", 0, static_cast<unsigned>(plan.num_groups * plan.num_lanes), 0};
  const auto kernel = staged_kernel<T, kAccess>(launch);
  launch.num_blocks = plan.num_runs;
  kernel<<<launch.num_blocks, launch.num_threads, launch.shared_bytes, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch);
}

template <typename Params>
void dispatch(const Params& params, DType dtype, CUstream_st* stream) {
  dispatch_dtype<StorageTypes>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (all_aligned16<T>(params)) {
      launch<T, Access::kVec16>(params, stream);
    } else {
      launch<T, Access::kElement>(params, stream);
    }
  });
}

}  // namespace

int token_shift_norm_backward_runs(DType dtype, int dim) {
  TokenShiftNormParams params{};
  params.dim = dim;
  check(params);
  int num_blocks = 0;
  Launch launch{"token_shift_norm_backward", 0, 0, 0};
  const int num_multiprocessors = count_multiprocessors(launch);
  dispatch_dtype<StorageTypes>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const RowPlan plan = plan_rows<T, Access::kVec16>(params, 1);
    launch.num_threads = plan.num_groups * plan.num_lanes;
    const auto kernel = staged_kernel<T, Access::kVec16>(launch);
    ANDROMEDA_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&num_blocks, kernel, launch.num_threads, launch.shared_bytes),
        launch);
  });
  return num_multiprocessors * std::max(num_blocks, 1);
}

void token_shift_norm_forward(const TokenShiftNormParams& params, CUstream_st* stream) {
  check(params);
  dispatch(params, params.dtype, stream);
}

void token_shift_norm_backward(const TokenShiftNormBackwardParams& params, CUstream_st* stream) {
  check(params.forward);
  dispatch(params, params.forward.dtype, stream);
}

}  // namespace andromeda::cuda
