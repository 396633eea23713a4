// qk_norm_rotary on the GPU (SPEC 5.2, 5.3, 16.3): kernels. The launches are in qk_norm_rotary.cu.
//
//   forward    x_hat = x / max(||x||, 1e-12)      out = R (scale * x_hat)     R: rotation of pairs, times z
//   backward   g = R^T dout                       dscale = sum of g * x_hat over tokens
//              e = scale * g                      dx = (e - x_hat <x_hat, e>) / ||x||, or e / 1e-12 if ||x|| < 1e-12
//
// R and its factors are in andromeda/qk_norm_rotary.h. x_hat is recomputed by the backward pass: cheaper than storing
// it. A row is one head of one token. A group of 2^n lanes owns one row at a time, and a block walks the tokens of one
// run with a tile of heads that lie side by side in memory. Head size 64, half precision, four heads in a tile:
//
//                head 0            head 1            head 2            head 3
//   token 0   | lanes 0 ... 7   | lanes 8 ... 15  | lanes 16 ... 23 | lanes 24 ... 31 |   one access of a warp: 512
//   token 1   | the next warp of the block ...                                        |   bytes, each lane 16
//
// A lane keeps its channels of `scale`, and of the sum for dscale, in registers while its group walks the tokens. All
// tokens' rows of the table are read by every head: from L1 inside a tile, from L2 by the other tiles.
//
// Registers: x (and dout) of kRows rows as stored, one row of scale, table and dscale as float. Shared memory:
// backward only, up to 8 KiB, to add dscale over the groups of a block in a fixed order.
// Bytes per call: x and out once (forward); x, dout and dx once, and dscale_partial (backward); the table from DRAM
// once. About 7 flops per element forward and 14 backward: memory is the limit by a factor of ten.
// Not supported: head_dim odd or above 512, float64. The binding has checked shapes; the .cu checks what is left.
#pragma once

#include <cstdint>

#include "andromeda/qk_norm_rotary.h"
#include "load.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kThreads = 128;
inline constexpr int kMaxHeadDim = 512;
inline constexpr float kNormFloor = 1e-12f;
static_assert(kThreads % kWarpLanes == 0);
static_assert(kNormFloor * kNormFloor > 1.1754944e-38f, "the squared floor must be a normal number");

// Chunks of a row per lane, for rows that need more than one.
template <typename T>
inline constexpr int kWideChunks = kMaxHeadDim / (kWarpLanes * kChunkWidth<T>);

// How one operand is dealt to blocks. Block i owns head tile i % num_head_tiles of run i / num_head_tiles: neighbours
// in time are neighbours in memory.
struct OperandPlan {
  std::int64_t num_tokens;  // batch * seqlen
  std::int64_t run_length;  // tokens; the last runs may be shorter or empty
  int tile_heads_log2;      // a tile divides num_heads, so that every group has a head
  int num_head_tiles;
  int step_batch, step_seq;  // the tokens that a block handles at once = step_batch * seqlen + step_seq
  unsigned num_blocks;
};

struct Plan {
  OperandPlan q, k;
  int group_log2;  // lanes of a group
};

// A lane's part in its block.
struct Place {
  int head, head_in_tile;
  int lane;        // in its group
  int token_lane;  // groups with one head take tokens in turn: this one the token_lane-th
  int num_token_lanes;
  std::int64_t run, first_token, end_token;  // of the block

  __device__ Place(const OperandPlan& plan, int group_log2, unsigned block) {
    const unsigned tile = block % plan.num_head_tiles;
    run = block / plan.num_head_tiles;
    first_token = run * plan.run_length;
    end_token = min(first_token + plan.run_length, plan.num_tokens);
    const int group = static_cast<int>(threadIdx.x) >> group_log2;
    lane = static_cast<int>(threadIdx.x) & ((1 << group_log2) - 1);
    head_in_tile = group & ((1 << plan.tile_heads_log2) - 1);
    head = (tile << plan.tile_heads_log2) + head_in_tile;
    token_lane = group >> plan.tile_heads_log2;
    num_token_lanes = kThreads >> group_log2 >> plan.tile_heads_log2;
  }
};

// A token, numbered through the batch, and its coordinates. Divides once; steps add.
struct Token {
  std::int64_t index;
  int batch, seq;

  __device__ Token(std::int64_t index, int seqlen) : index(index) {
    const int divisor = max(seqlen, 1);  // an empty operand has no tokens to look up, but a scale gradient to zero
    batch = static_cast<int>(index / divisor);
    seq = static_cast<int>(index - static_cast<std::int64_t>(batch) * divisor);
  }

  __device__ void step(const OperandPlan& plan, int num_token_lanes, int seqlen) {
    index += num_token_lanes;
    batch += plan.step_batch;
    seq += plan.step_seq;
    if (seq >= seqlen) {
      seq -= seqlen;
      ++batch;
    }
  }

  __device__ std::int64_t offset(const SeqStrides& stride) const { return batch * stride.batch + seq * stride.seq; }
};

// The channels of a row that belong to one lane: chunk c of the group is 2^group_log2 adjacent 16-byte pieces.
template <typename T, Access kAccess, int kChunks>
struct Slice {
  static constexpr int kChunkPairs = Chunk<T>::kPairs;
  static constexpr int kPairs = kChunks * kChunkPairs;
  static_assert(kChunkWidth<T> % 2 == 0, "a rotated pair must not cross lanes");

  int lane, group_log2, head_dim, rotary_dim;

  __device__ int channel(int chunk) const { return ((chunk << group_log2) + lane) * kChunkWidth<T>; }

  __device__ void load_row(Chunk<T> (&chunks)[kChunks], const T* row, bool inside) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      chunks[c] = load_once<kAccess>(row + channel(c), inside ? head_dim - channel(c) : 0);
    }
  }

  __device__ void store_row(T* row, const float2 (&values)[kPairs]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      Chunk<T> chunk;
#pragma unroll
      for (int i = 0; i < kChunkPairs; ++i) chunk.pairs[i] = from_floats<T>(values[c * kChunkPairs + i]);
      store<kAccess>(row + channel(c), chunk, head_dim - channel(c));
    }
  }

  // `row` is a row of `width` constants, or nullptr for `fill` everywhere.
  __device__ void load_constant_row(float2 (&pairs)[kPairs], const float* row, int width, float2 fill) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float2(&part)[kChunkPairs] = reinterpret_cast<float2(&)[kChunkPairs]>(pairs[c * kChunkPairs]);
      load_constants<kAccess>(part, row + channel(c), row == nullptr ? 0 : width - channel(c), fill);
    }
  }

  __device__ void load_scale(float2 (&scale)[kPairs], const QkNormRotaryOperand& operand, int head) const {
    const float* row = operand.scale == nullptr ? nullptr : operand.scale + static_cast<std::int64_t>(head) * head_dim;
    load_constant_row(scale, row, head_dim, make_float2(1.0f, 1.0f));
  }

  // Pairs (z cos, z sin). Those from rotary_dim on are not used.
  __device__ void load_rotation(float2 (&rotation)[kPairs], const QkNormRotaryOperand& operand, int seq,
                                bool inside) const {
    const float* row = operand.table == nullptr ? nullptr : operand.table + static_cast<std::int64_t>(seq) * rotary_dim;
    load_constant_row(rotation, inside ? row : nullptr, rotary_dim, make_float2(0.0f, 0.0f));
  }

  // Channels from rotary_dim on pass through: times 1 plus 0 times their neighbour would spread an infinity.
  __device__ bool is_rotated(int index) const {
    return channel(index / kChunkPairs) + 2 * (index % kChunkPairs) < rotary_dim;
  }

  __device__ static float2 pair(const Chunk<T> (&chunks)[kChunks], int index) {
    return to_floats(chunks[index / kChunkPairs].pairs[index % kChunkPairs]);
  }
};

__device__ inline float2 rotate(float2 x, float2 rotation) {
  return make_float2(x.x * rotation.x - x.y * rotation.y, x.y * rotation.x + x.x * rotation.y);
}

__device__ inline float2 rotate_transposed(float2 x, float2 rotation) {
  return make_float2(x.x * rotation.x + x.y * rotation.y, x.y * rotation.x - x.x * rotation.y);
}

__device__ inline float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }
__device__ inline float2 operator*(float2 a, float b) { return make_float2(a.x * b, a.y * b); }
__device__ inline float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ inline float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }
__device__ inline float dot(float2 a, float2 b) { return a.x * b.x + a.y * b.y; }

__device__ inline bool above_floor(float sum_of_squares) {
  return !(sum_of_squares < kNormFloor * kNormFloor);  // true for NaN, which must reach the result
}

// 1 / max(norm, floor). rsqrtf is within 2 ulp, a factor common to the whole row.
__device__ inline float inverse_norm(float sum_of_squares) {
  return above_floor(sum_of_squares) ? rsqrtf(sum_of_squares) : 1.0f / kNormFloor;
}

template <typename T, Access kAccess, int kChunks, int kRows>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rotary_forward_kernel(const __grid_constant__ QkNormRotaryParams params,
                                  const __grid_constant__ Plan plan) {
  using LaneSlice = Slice<T, kAccess, kChunks>;
  constexpr int kPairs = LaneSlice::kPairs;
  const bool is_q = blockIdx.x < plan.q.num_blocks;
  const QkNormRotaryOperand& operand = is_q ? params.q : params.k;
  const OperandPlan& operand_plan = is_q ? plan.q : plan.k;
  const Place place(operand_plan, plan.group_log2, is_q ? blockIdx.x : blockIdx.x - plan.q.num_blocks);
  const LaneSlice slice{place.lane, plan.group_log2, params.head_dim, params.rotary_dim};

  const T* x = static_cast<const T*>(operand.x) + place.head * operand.x_stride.head;
  T* out = static_cast<T*>(operand.out) + place.head * operand.out_stride.head;
  float2 scale[kPairs];
  slice.load_scale(scale, operand, place.head);

  // The trip count is that of the whole block, because shuffles need whole warps.
  Token token(place.first_token + place.token_lane, operand.seqlen);
  for (std::int64_t first = place.first_token; first < place.end_token; first += kRows * place.num_token_lanes) {
    // Step 1: every load of kRows rows, so that all are in flight together.
    Chunk<T> chunks[kRows][kChunks];
    float2 rotation[kRows][kPairs];
    std::int64_t out_offset[kRows];
    bool inside[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      inside[row] = token.index < place.end_token;
      slice.load_row(chunks[row], x + token.offset(operand.x_stride), inside[row]);
      slice.load_rotation(rotation[row], operand, token.seq, inside[row]);
      out_offset[row] = token.offset(operand.out_stride);
      token.step(operand_plan, place.num_token_lanes, operand.seqlen);
    }

    // Step 2: the norms.
    float sum_of_squares[kRows] = {};
    if (params.normalize) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float2 value = slice.pair(chunks[row], i);
          sum_of_squares[row] += dot(value, value);
        }
      }
      sum_over_group(sum_of_squares, plan.group_log2);
    }

    // Step 3: normalise, scale, rotate.
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float inverse = params.normalize ? inverse_norm(sum_of_squares[row]) : 1.0f;
      float2 result[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 scaled = slice.pair(chunks[row], i) * inverse * scale[i];
        result[i] = slice.is_rotated(i) ? rotate(scaled, rotation[row][i]) : scaled;
      }
      if (inside[row]) slice.store_row(out + out_offset[row], result);
    }
  }
}

// Adds the groups' sums head by head, in the order of their token lanes, and writes the block's part of a run.
template <typename LaneSlice>
__device__ inline void write_dscale(const float2 (&dscale)[LaneSlice::kPairs], const LaneSlice& slice,
                                    const Place& place, const OperandPlan& plan, int num_heads, float* partial) {
  constexpr int kChunkPairs = LaneSlice::kChunkPairs;
  __shared__ float2 sums[kThreads * LaneSlice::kPairs];  // (token lane, head of the tile, channel)
  static_assert(sizeof sums <= 8 * 1024, "must not limit the blocks per multiprocessor");
  const int padded_head_dim = 2 * LaneSlice::kPairs << slice.group_log2;
  const int group = static_cast<int>(threadIdx.x) >> slice.group_log2;
#pragma unroll
  for (int i = 0; i < LaneSlice::kPairs; ++i) {
    sums[(group * padded_head_dim + slice.channel(i / kChunkPairs)) / 2 + i % kChunkPairs] = dscale[i];
  }
  __syncthreads();  // the sums of all groups are there

  const float* group_sums = reinterpret_cast<const float*>(sums);
  const int tile_heads = 1 << plan.tile_heads_log2;
  partial += (place.run * num_heads + (place.head - place.head_in_tile)) * slice.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < tile_heads * slice.head_dim; i += kThreads) {
    const int head_in_tile = i / slice.head_dim;
    const int channel = i - head_in_tile * slice.head_dim;
    float sum = 0.0f;
    for (int token_lane = 0; token_lane < place.num_token_lanes; ++token_lane) {
      sum += group_sums[(token_lane * tile_heads + head_in_tile) * padded_head_dim + channel];
    }
    partial[i] = sum;
  }
}

template <typename T, Access kAccess, int kChunks, int kRows>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rotary_backward_kernel(const __grid_constant__ QkNormRotaryBackwardParams params,
                                   const __grid_constant__ Plan plan) {
  using LaneSlice = Slice<T, kAccess, kChunks>;
  constexpr int kPairs = LaneSlice::kPairs;
  const bool is_q = blockIdx.x < plan.q.num_blocks;
  const QkNormRotaryBackwardOperand& operand = is_q ? params.q : params.k;
  const QkNormRotaryOperand& forward = operand.forward;
  const OperandPlan& operand_plan = is_q ? plan.q : plan.k;
  const Place place(operand_plan, plan.group_log2, is_q ? blockIdx.x : blockIdx.x - plan.q.num_blocks);
  const LaneSlice slice{place.lane, plan.group_log2, params.head_dim, params.rotary_dim};

  const T* x = static_cast<const T*>(forward.x) + place.head * forward.x_stride.head;
  const T* dout = static_cast<const T*>(operand.dout) + place.head * operand.dout_stride.head;
  T* dx = static_cast<T*>(operand.dx) + place.head * operand.dx_stride.head;
  float2 scale[kPairs];
  slice.load_scale(scale, forward, place.head);
  float2 dscale[kPairs] = {};

  // The trip count is that of the whole block, because shuffles need whole warps.
  Token token(place.first_token + place.token_lane, forward.seqlen);
  for (std::int64_t first = place.first_token; first < place.end_token; first += kRows * place.num_token_lanes) {
    // Step 1: every load of kRows rows. Rows past the end are zeros: they add nothing to dscale.
    Chunk<T> chunks[kRows][kChunks], dout_chunks[kRows][kChunks];
    float2 rotation[kRows][kPairs];
    std::int64_t dx_offset[kRows];
    bool inside[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      inside[row] = token.index < place.end_token;
      slice.load_row(chunks[row], x + token.offset(forward.x_stride), inside[row]);
      slice.load_row(dout_chunks[row], dout + token.offset(operand.dout_stride), inside[row]);
      slice.load_rotation(rotation[row], forward, token.seq, inside[row]);
      dx_offset[row] = token.offset(operand.dx_stride);
      token.step(operand_plan, place.num_token_lanes, forward.seqlen);
    }

    // Step 2: g, ||x||^2 and <x, e>.
    float2 g[kRows][kPairs];
    float sums[2 * kRows] = {};
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 value = slice.pair(chunks[row], i);
        const float2 gradient = slice.pair(dout_chunks[row], i);
        g[row][i] = slice.is_rotated(i) ? rotate_transposed(gradient, rotation[row][i]) : gradient;
        sums[2 * row] += dot(value, value);
        sums[2 * row + 1] += dot(value, g[row][i] * scale[i]);
      }
    }
    if (params.normalize) sum_over_group(sums, plan.group_log2);

    // Step 3: both gradients. In this order: inverse may be 1e12, and its cube does not fit a float.
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float inverse = params.normalize ? inverse_norm(sums[2 * row]) : 1.0f;
      const float along = params.normalize && above_floor(sums[2 * row]) ? sums[2 * row + 1] * inverse : 0.0f;
      float2 result[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 x_hat = slice.pair(chunks[row], i) * inverse;
        dscale[i] = dscale[i] + g[row][i] * x_hat;
        result[i] = g[row][i] * scale[i];
        if (params.normalize) result[i] = (result[i] - x_hat * along) * inverse;
      }
      if (inside[row]) slice.store_row(dx + dx_offset[row], result);
    }
  }

  if (operand.dscale_partial != nullptr) {
    write_dscale(dscale, slice, place, operand_plan, forward.num_heads, operand.dscale_partial);
  }
}

}  // namespace andromeda::cuda
