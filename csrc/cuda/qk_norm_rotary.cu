// qk_norm_rotary on the GPU: checks, the plan of the grid, dispatch and launch. The kernels are in qk_norm_rotary.cuh.
//
// The tensors' device must be the current one. Nothing is allocated and nothing waits: a launch can be captured.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "check.cuh"
#include "qk_norm_rotary.cuh"

namespace andromeda::cuda {
namespace {

// Rows that a group transforms when nothing else fixes the length of a run: enough to pay for its start (the scale,
// the division), few enough to give a small call many blocks.
constexpr int kRowsPerGroup = 4;

int floor_log2(int value) {
  int log2 = 0;
  while (value >> (log2 + 1) != 0) ++log2;
  return log2;
}

int ceil_log2(int value) { return value <= 1 ? 0 : floor_log2(value - 1) + 1; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

void check_widths(int head_dim, int rotary_dim) {
  if (head_dim < 2 || head_dim > kMaxHeadDim || head_dim % 2 != 0) {
    throw std::invalid_argument("qk_norm_rotary: head_dim must be even and between 2 and " +
                                std::to_string(kMaxHeadDim) + " on CUDA, got " + std::to_string(head_dim));
  }
  if (rotary_dim < 0 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
    throw std::invalid_argument("qk_norm_rotary: rotary_dim must be even and between 0 and head_dim=" +
                                std::to_string(head_dim) + ", got " + std::to_string(rotary_dim));
  }
}

bool in_chunks(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % kChunkBytes == 0; }

// Whether every row of a tensor can be read in chunks. The stride of a dimension of size 1 is never used.
template <typename T>
bool in_chunks(const void* data, const SeqStrides& stride, int batch, int seqlen, int num_heads) {
  const auto fits = [](int size, std::int64_t step) { return size <= 1 || step % kChunkWidth<T> == 0; };
  return in_chunks(data) && fits(batch, stride.batch) && fits(seqlen, stride.seq) && fits(num_heads, stride.head);
}

template <typename T>
bool in_chunks(const QkNormRotaryOperand& operand, int batch) {
  const int seqlen = operand.seqlen, num_heads = operand.num_heads;
  return in_chunks<T>(operand.x, operand.x_stride, batch, seqlen, num_heads) &&
         (operand.out == nullptr || in_chunks<T>(operand.out, operand.out_stride, batch, seqlen, num_heads)) &&
         in_chunks(operand.scale) && in_chunks(operand.table);
}

template <typename T>
bool in_chunks(const QkNormRotaryBackwardOperand& operand, int batch) {
  const int seqlen = operand.forward.seqlen, num_heads = operand.forward.num_heads;
  return in_chunks<T>(operand.forward, batch) &&
         in_chunks<T>(operand.dout, operand.dout_stride, batch, seqlen, num_heads) &&
         in_chunks<T>(operand.dx, operand.dx_stride, batch, seqlen, num_heads);
}

template <typename T, typename Params>
bool in_chunks(const Params& params) {
  static_assert(kChunkWidth<T> % kChunkWidth<float> == 0, "chunks of x must read whole chunks of scale");
  return params.head_dim % kChunkWidth<T> == 0 && params.rotary_dim % kChunkWidth<float> == 0 &&
         in_chunks<T>(params.q, params.batch) && in_chunks<T>(params.k, params.batch);
}

// num_runs == 0: as many as keep the device busy.
OperandPlan plan_operand(const QkNormRotaryOperand& operand, int batch, int group_log2, std::int64_t num_runs) {
  OperandPlan plan{};
  const int num_groups = kThreads >> group_log2;
  plan.num_tokens = static_cast<std::int64_t>(batch) * operand.seqlen;
  if (operand.num_heads == 0 || (plan.num_tokens == 0 && num_runs == 0)) return plan;  // no blocks

  const int even_part = operand.num_heads & -operand.num_heads;  // the largest power of two that divides it
  plan.tile_heads_log2 = floor_log2(std::min(even_part, num_groups));
  plan.num_head_tiles = operand.num_heads >> plan.tile_heads_log2;
  const int num_token_lanes = num_groups >> plan.tile_heads_log2;
  plan.step_batch = num_token_lanes / std::max(operand.seqlen, 1);
  plan.step_seq = num_token_lanes % std::max(operand.seqlen, 1);
  const std::int64_t max_runs = INT_MAX / 2 / plan.num_head_tiles;  // both operands share one grid dimension
  if (num_runs > max_runs) {
    throw std::invalid_argument("qk_norm_rotary: num_partials must be at most " + std::to_string(max_runs) + " for " +
                                std::to_string(operand.num_heads) + " heads, got " + std::to_string(num_runs));
  }
  if (num_runs == 0) num_runs = std::min(ceil_div(plan.num_tokens, num_token_lanes * kRowsPerGroup), max_runs);
  plan.run_length = ceil_div(plan.num_tokens, num_runs);
  plan.num_blocks = static_cast<unsigned>(num_runs * plan.num_head_tiles);
  return plan;
}

template <typename T, Access kAccess, int kChunks>
void launch(const QkNormRotaryParams& params, CUstream_st* stream) {
  constexpr int kRows = kChunks == 1 ? 2 : 1;
  const int group_log2 = ceil_log2(static_cast<int>(ceil_div(params.head_dim, kChunks * kChunkWidth<T>)));
  const Plan plan = {plan_operand(params.q, params.batch, group_log2, 0),
                     plan_operand(params.k, params.batch, group_log2, 0), group_log2};
  const unsigned num_blocks = plan.q.num_blocks + plan.k.num_blocks;
  if (num_blocks == 0) return;
  qk_norm_rotary_forward_kernel<T, kAccess, kChunks, kRows><<<num_blocks, kThreads, 0, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), (Launch{"qk_norm_rotary_forward", num_blocks, kThreads, 0}));
}

template <typename T, Access kAccess, int kChunks>
void launch(const QkNormRotaryBackwardParams& params, CUstream_st* stream) {
  constexpr int kRows = 1;
  const int group_log2 = ceil_log2(static_cast<int>(ceil_div(params.head_dim, kChunks * kChunkWidth<T>)));
  const auto plan_of = [&](const QkNormRotaryBackwardOperand& operand) {
    const int num_runs = operand.dscale_partial == nullptr ? 0 : params.num_partials;
    return plan_operand(operand.forward, params.batch, group_log2, num_runs);
  };
  const Plan plan = {plan_of(params.q), plan_of(params.k), group_log2};
  const unsigned num_blocks = plan.q.num_blocks + plan.k.num_blocks;
  if (num_blocks == 0) return;
  qk_norm_rotary_backward_kernel<T, kAccess, kChunks, kRows><<<num_blocks, kThreads, 0, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), (Launch{"qk_norm_rotary_backward", num_blocks, kThreads, 0}));
}

// Three variants of each kernel: one chunk per lane where a warp covers the row, several for longer rows, and the same
// element by element for rows that do not lie in chunks.
template <typename Params>
void dispatch(const Params& params, CUstream_st* stream) {
  check_widths(params.head_dim, params.rotary_dim);
  dispatch_dtype<StorageTypes>(params.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    if (!in_chunks<T>(params)) {
      launch<T, Access::kElement, kWideChunks<T>>(params, stream);
    } else if (params.head_dim > kWarpLanes * kChunkWidth<T>) {
      launch<T, Access::kChunk, kWideChunks<T>>(params, stream);
    } else {
      launch<T, Access::kChunk, 1>(params, stream);
    }
  });
}

}  // namespace

void qk_norm_rotary_forward(const QkNormRotaryParams& params, CUstream_st* stream) { dispatch(params, stream); }

void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, CUstream_st* stream) {
  dispatch(params, stream);
}

}  // namespace andromeda::cuda
