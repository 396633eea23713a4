// qk_norm_rotary on the GPU: checks, the plan of the grid, dispatch and launch. The kernels are in qk_norm_rotary.cuh.
//
// The tensors' device must be the current one. A call allocates nothing and waits for nothing: it can be captured.
#include <algorithm>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "alignment.h"
#include "andromeda/dispatch.h"
#include "andromeda/integers.h"
#include "check.cuh"
#include "qk_norm_rotary.cuh"

namespace andromeda::cuda {
namespace {

// Rows that a group transforms when nothing else fixes the length of a run: enough to amortise its start (loading the
// scale, the divisions), few enough to give a small call many blocks.
constexpr int kRowsPerGroup = 4;
constexpr int kMaxRunLength = 1 << 30;  // tokens: they are counted in an int, a few steps past the end
static_assert(kMaxRunLength <= INT_MAX - 2 * kThreads);

int floor_log2(int value) {
  int log2 = 0;
  while (value >> (log2 + 1) != 0) ++log2;
  return log2;
}

int ceil_log2(int value) { return value <= 1 ? 0 : floor_log2(value - 1) + 1; }

void check_rows(int head_dim, int rotary_dim) {
  if (head_dim < 2 || head_dim > kMaxRotaryHeadDim || head_dim % 2 != 0) {
    throw std::invalid_argument("qk_norm_rotary: head_dim must be even and between 2 and " +
                                std::to_string(kMaxRotaryHeadDim) + " on CUDA, got " + std::to_string(head_dim));
  }
  if (rotary_dim < 0 || rotary_dim > head_dim || rotary_dim % 2 != 0) {
    throw std::invalid_argument("qk_norm_rotary: rotary_dim must be even and between 0 and head_dim=" +
                                std::to_string(head_dim) + ", got " + std::to_string(rotary_dim));
  }
}

void check_operand(const QkNormRotaryOperand& operand, int rotary_dim, bool has_step) {
  const int max_seqlen = kMaxRotarySeqlen - (has_step ? kMaxRotaryStep : 0);
  if (operand.seqlen > max_seqlen) {
    throw std::invalid_argument("qk_norm_rotary: seqlen must be at most " + std::to_string(max_seqlen) +
                                " on CUDA, got " + std::to_string(operand.seqlen));
  }
  if (rotary_dim > 0 && operand.table == nullptr && operand.seqlen > 0) {
    throw std::invalid_argument("qk_norm_rotary: the tables must be given for rotary_dim > 0, got none");
  }
}

// Factors are read two at a time. Their rows of rotary_dim / 2, an even number, are contiguous.
bool is_aligned8(const float* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(float2) == 0; }

template <typename T>
bool all_aligned16(const QkNormRotaryOperand& operand, int batch) {
  const int seqlen = operand.seqlen, num_heads = operand.num_heads;
  return is_aligned16<T>(operand.x, operand.x_stride, batch, seqlen, num_heads) &&
         (operand.out == nullptr || is_aligned16<T>(operand.out, operand.out_stride, batch, seqlen, num_heads)) &&
         is_aligned16(operand.scale) && is_aligned16(operand.table) && is_aligned8(operand.factors);
}

template <typename T>
bool all_aligned16(const QkNormRotaryBackwardOperand& operand, int batch) {
  const int seqlen = operand.forward.seqlen, num_heads = operand.forward.num_heads;
  return all_aligned16<T>(operand.forward, batch) &&
         is_aligned16<T>(operand.dout, operand.dout_stride, batch, seqlen, num_heads) &&
         is_aligned16<T>(operand.dx, operand.dx_stride, batch, seqlen, num_heads);
}

template <typename T, typename Params>
bool all_aligned16(const Params& params) {
  static_assert(kVec16Width<T> % kVec16Width<float> == 0, "vectors of x must read whole vectors of scale");
  return params.head_dim % kVec16Width<T> == 0 && params.rotary_dim % kVec16Width<float> == 0 &&
         all_aligned16<T>(params.q, params.batch) && all_aligned16<T>(params.k, params.batch);
}

Pitch pitch_of(const OperandPlan& plan, int seqlen, const SeqStrides& stride) {
  const int step_batch = plan.num_token_lanes / std::max(seqlen, 1);
  const std::int64_t inside = step_batch * stride.batch + plan.step_seq * stride.seq;
  return {inside, inside + stride.batch - seqlen * stride.seq};
}

// log2 of the heads that a block has at a time: the largest power of two that divides num_heads, at most num_groups.
int tile_heads_log2_of(int num_heads, int num_groups) {
  return floor_log2(std::min(num_heads & -num_heads, num_groups));
}

// num_runs == 0: as many runs as keep the device busy.
OperandPlan plan_operand(const QkNormRotaryOperand& operand, const QkNormRotaryParams& params, int group_log2,
                         std::int64_t num_runs) {
  check_operand(operand, params.rotary_dim, params.step != nullptr);
  OperandPlan plan{};
  plan.num_tokens = static_cast<std::int64_t>(params.batch) * operand.seqlen;
  if (operand.num_heads == 0 || (plan.num_tokens == 0 && num_runs == 0)) return plan;  // no blocks

  const int num_groups = kThreads >> group_log2;
  plan.tile_heads_log2 = tile_heads_log2_of(operand.num_heads, num_groups);
  plan.num_head_tiles = operand.num_heads >> plan.tile_heads_log2;
  plan.num_token_lanes = num_groups >> plan.tile_heads_log2;
  plan.step_seq = plan.num_token_lanes % std::max(operand.seqlen, 1);
  plan.x = pitch_of(plan, operand.seqlen, operand.x_stride);
  plan.out = pitch_of(plan, operand.seqlen, operand.out_stride);
  plan.table = pitch_of(plan, operand.seqlen, {0, params.rotary_dim, 0});

  const std::int64_t max_runs = INT_MAX / 2 / plan.num_head_tiles;  // both operands share one grid dimension
  if (num_runs == 0) num_runs = std::min(ceil_div(plan.num_tokens, plan.num_token_lanes * kRowsPerGroup), max_runs);
  const std::int64_t run_length = ceil_div(plan.num_tokens, num_runs);
  if (num_runs > max_runs || run_length > kMaxRunLength) {
    throw std::invalid_argument("qk_norm_rotary: num_partials must be between " +
                                std::to_string(ceil_div(plan.num_tokens, kMaxRunLength)) + " and " +
                                std::to_string(max_runs) + ", got " + std::to_string(num_runs));
  }
  plan.run_length = static_cast<int>(run_length);
  plan.num_blocks = static_cast<unsigned>(num_runs * plan.num_head_tiles);
  return plan;
}

template <typename T>
int group_log2_of(int head_dim, int vecs_per_lane) {
  return ceil_log2(static_cast<int>(ceil_div(head_dim, vecs_per_lane * kVec16Width<T>)));
}

template <typename T, Access kAccess, int kVecs>
void launch(const QkNormRotaryParams& params, CUstream_st* stream) {
  constexpr int kRows = kVecs == 1 ? 2 : 1;  // 32 bytes in flight per lane, or more
  const int group_log2 = group_log2_of<T>(params.head_dim, kVecs);
  const Plan plan = {plan_operand(params.q, params, group_log2, 0), plan_operand(params.k, params, group_log2, 0),
                     group_log2};
  const unsigned num_blocks = plan.q.num_blocks + plan.k.num_blocks;
  if (num_blocks == 0) return;
  qk_norm_rotary_forward_kernel<T, kAccess, kVecs, kRows><<<num_blocks, kThreads, 0, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), (Launch{"qk_norm_rotary_forward", num_blocks, kThreads, 0}));
}

template <typename T, Access kAccess, int kVecs>
void launch(const QkNormRotaryBackwardParams& params, CUstream_st* stream) {
  const int group_log2 = group_log2_of<T>(params.head_dim, kVecs);
  const QkNormRotaryParams forward = {params.q.forward, params.k.forward,  nullptr,          params.batch,
                                      params.head_dim,  params.rotary_dim, params.normalize, params.dtype};
  const auto plan_of = [&](const QkNormRotaryBackwardOperand& operand) {
    if (operand.dscale_partial != nullptr && params.num_partials < 1) {
      throw std::invalid_argument("qk_norm_rotary: num_partials must be positive, got " +
                                  std::to_string(params.num_partials));
    }
    const int num_runs = operand.dscale_partial == nullptr ? 0 : params.num_partials;
    OperandPlan plan = plan_operand(operand.forward, forward, group_log2, num_runs);
    plan.dout = pitch_of(plan, operand.forward.seqlen, operand.dout_stride);
    plan.out = pitch_of(plan, operand.forward.seqlen, operand.dx_stride);
    return plan;
  };
  const Plan plan = {plan_of(params.q), plan_of(params.k), group_log2};
  const unsigned num_blocks = plan.q.num_blocks + plan.k.num_blocks;
  if (num_blocks == 0) return;
  qk_norm_rotary_backward_kernel<T, kAccess, kVecs><<<num_blocks, kThreads, 0, stream>>>(params, plan);
  ANDROMEDA_CUDA_CHECK(cudaGetLastError(), (Launch{"qk_norm_rotary_backward", num_blocks, kThreads, 0}));
}

// Three variants of each kernel: one vector per lane where a warp covers the row, several for longer rows, and several
// that are read element by element for rows that are not aligned.
template <typename Params>
void dispatch(const Params& params, CUstream_st* stream) {
  check_rows(params.head_dim, params.rotary_dim);
  dispatch_dtype<StorageTypes>(params.dtype, [&](auto dtype) {
    using T = typename decltype(dtype)::type;
    if (!all_aligned16<T>(params)) {
      launch<T, Access::kElement, kWideVecs<T>>(params, stream);
    } else if (params.head_dim > kWarpLanes * kVec16Width<T>) {
      launch<T, Access::kVec16, kWideVecs<T>>(params, stream);
    } else {
      launch<T, Access::kVec16, 1>(params, stream);
    }
  });
}

// Blocks for one run of an operand with num_heads heads.
int count_head_tiles(int num_heads, int group_log2) {
  return num_heads == 0 ? 0 : num_heads >> tile_heads_log2_of(num_heads, kThreads >> group_log2);
}

template <typename T, int kVecs>
int count_runs(int head_dim, int q_heads, int k_heads) {
  const Launch launch{"qk_norm_rotary_backward", 0, kThreads, 0};
  const int num_multiprocessors = count_multiprocessors(launch);
  int num_blocks = 0;
  const auto kernel = qk_norm_rotary_backward_kernel<T, Access::kVec16, kVecs>;
  ANDROMEDA_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&num_blocks, kernel, kThreads, 0), launch);
  const int group_log2 = group_log2_of<T>(head_dim, kVecs);
  const int tiles = std::max(count_head_tiles(q_heads, group_log2), count_head_tiles(k_heads, group_log2));
  return std::max(num_multiprocessors * num_blocks / std::max(tiles, 1), 1);
}

}  // namespace

int qk_norm_rotary_backward_runs(DType dtype, int head_dim, int q_heads, int k_heads) {
  check_rows(head_dim, 0);
  int runs = 0;
  dispatch_dtype<StorageTypes>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = head_dim > kWarpLanes * kVec16Width<T>;
    runs =
        wide ? count_runs<T, kWideVecs<T>>(head_dim, q_heads, k_heads) : count_runs<T, 1>(head_dim, q_heads, k_heads);
  });
  return runs;
}

void qk_norm_rotary_forward(const QkNormRotaryParams& params, CUstream_st* stream) { dispatch(params, stream); }

void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, CUstream_st* stream) {
  dispatch(params, stream);
}

}  // namespace andromeda::cuda
