// qk_norm_rotary on the GPU (docs/model.md#5.2, #5.3, #16.3): kernels. The launches are in qk_norm_rotary.cu.
//
//   forward    x_hat = x / max(||x||, 1e-12)      out = R (m scale * x_hat)     R: rotation of pairs, times z
//   backward   g = R^T dout                       dscale = m * sum of g * x_hat over tokens
//              e = m scale * g                    dx = (e - x_hat <x_hat, e>) / ||x||, or e / 1e-12 if ||x|| < 1e-12
//
// R, its factors and m, the multiplier of q, are in andromeda/qk_norm_rotary.h. Recomputing x_hat in the backward pass
// costs less than storing it. A row is one head of one token. A group of 2^n lanes owns one row at a time, and a block walks the tokens of one
// run with a tile of heads that lie side by side in memory. Head size 64, half precision, four heads in a tile:
//
//                head 0            head 1            head 2            head 3
//   token 0   | lanes 0 ... 7   | lanes 8 ... 15  | lanes 16 ... 23 | lanes 24 ... 31 |   one access of a warp: 512
//   token 1   | the next warp of the block ...                                        |   bytes, each lane 16
//
// A lane keeps its channels of `scale`, and of the sum for dscale, in registers while its group walks the tokens. The
// multiplier is a factor of these constants and of the finished sum, so that no row pays for it. Every head reads its token's row of the table: from L1 inside a tile, from L2 in the other tiles.
//
// Registers: x (and dout) of kRows rows as stored; scale, dscale and one row of the tables per row of x as float.
// Shared memory: backward only, up to 8 KiB, to add dscale over the groups of a block in a fixed order.
//
// Bytes per call: forward x and out once; backward x, dout and dx once, and dscale_partial; the tables, 6 bytes per
// position and rotated channel, once from DRAM.
// About 7 flops per element forward and 14 backward. Memory is the limit as long as the instructions around them are
// few: a warp spends about 180 forward and 260 backward for every 16 bytes of x per lane (bfloat16, head size 128,
// counted in the sm_80 code), where an H100 has time for about 280 and 420 while memory moves those bytes.
//
// Not supported: head_dim odd or above 512, float64. The binding has checked shapes; the .cu file checks the rest.
#pragma once

#include <cfloat>
#include <cstdint>

#include "andromeda/qk_norm_rotary.h"
#include "inverse_sqrt.cuh"
#include "load.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kThreads = 128;
inline constexpr float kNormFloor = 1e-12f;
static_assert(kThreads % kWarpLanes == 0);
static_assert(kNormFloor * kNormFloor > FLT_MIN, "the squared floor must be a normal number");

// Vectors of a row per lane, for rows that need more than one.
template <typename T>
inline constexpr int kWideVecs = kMaxRotaryHeadDim / (kWarpLanes * kVec16Width<T>);

// How far a pointer moves from one token of a group to its next one, in elements: inside a sequence, or across its end.
// Pointers are advanced, because 64-bit products for every row would cost as much as its arithmetic.
struct Pitch {
  std::int64_t inside, across;
  __device__ std::int64_t over(bool sequence_ends) const { return sequence_ends ? across : inside; }
};

// How blocks share one operand. Block i owns head tile i % num_head_tiles of run i / num_head_tiles: neighbours
// in time are neighbours in memory.
struct OperandPlan {
  std::int64_t num_tokens;  // batch * seqlen
  int run_length;           // tokens; the last runs may be shorter or empty
  int tile_heads_log2;      // a tile divides num_heads, so that every group has a head
  int num_head_tiles;
  int num_token_lanes;  // groups with the same head take the tokens of a run in turn
  int step_seq;         // num_token_lanes % seqlen
  unsigned num_blocks;
  Pitch x, dout, out, table;  // dout: backward; out: of dx there
};

struct Plan {
  OperandPlan q, k;
  int group_log2;  // lanes of a group
};

// A lane's part in its block, and where its group is among the tokens.
struct Place {
  std::int64_t run;
  int head, head_in_tile, lane;
  int num_tokens;  // of the block
  int token;       // the group's next, counted from the first of the block
  int batch, seq;  // its coordinates; batch is not updated

  __device__ Place(const OperandPlan& plan, int seqlen, int group_log2, unsigned block) {
    const int group = static_cast<int>(threadIdx.x) >> group_log2;
    lane = static_cast<int>(threadIdx.x) & ((1 << group_log2) - 1);
    head_in_tile = group & ((1 << plan.tile_heads_log2) - 1);
    head = static_cast<int>((block % plan.num_head_tiles) << plan.tile_heads_log2) + head_in_tile;
    token = group >> plan.tile_heads_log2;
    run = block / plan.num_head_tiles;
    const std::int64_t first = run * plan.run_length;
    const std::int64_t left = plan.num_tokens - first;  // not positive for an empty run
    num_tokens = static_cast<int>(min(left, static_cast<std::int64_t>(plan.run_length)));
    const int divisor = max(seqlen, 1);  // an operand without tokens may still have a scale gradient, which is zero
    batch = static_cast<int>((first + token) / divisor);
    seq = static_cast<int>(first + token - static_cast<std::int64_t>(batch) * divisor);
  }

  // Goes on to the group's next token; returns whether that passes the end of a sequence.
  __device__ bool next(const OperandPlan& plan, int seqlen) {
    token += plan.num_token_lanes;
    seq += plan.step_seq;
    const bool sequence_ends = seq >= seqlen;
    if (sequence_ends) seq -= seqlen;
    return sequence_ends;
  }

  template <typename T>
  __device__ T* row_of(T* tensor, const SeqStrides& stride) const {
    return tensor + batch * stride.batch + seq * stride.seq + head * stride.head;
  }
};

__device__ inline float2 operator*(float2 a, float2 b) { return make_float2(a.x * b.x, a.y * b.y); }
__device__ inline float2 operator*(float2 a, float b) { return make_float2(a.x * b, a.y * b); }
__device__ inline float2 operator-(float2 a, float2 b) { return make_float2(a.x - b.x, a.y - b.y); }
__device__ inline float2 operator+(float2 a, float2 b) { return make_float2(a.x + b.x, a.y + b.y); }

// The channels of a row that belong to one lane: one vector of 16 bytes in each run of 2^group_log2 adjacent ones.
// Pointers to rows are to the lane's first channel.
template <typename T, Access kAccess, int kVecs>
struct Slice {
  static constexpr int kVecPairs = Vec16<T>::kPairs;
  static constexpr int kPairs = kVecs * kVecPairs;
  static_assert(kVec16Width<T> % 2 == 0, "a rotated pair must not cross lanes");

  int lane, group_log2, head_dim, rotary_dim;

  __device__ int first_channel() const { return lane * kVec16Width<T>; }
  __device__ int offset(int vec) const { return (vec << group_log2) * kVec16Width<T>; }
  __device__ int channel(int vec) const { return first_channel() + offset(vec); }

  __device__ void load_row(Vec16<T> (&vecs)[kVecs], const T* row, bool inside) const {
#pragma unroll
    for (int c = 0; c < kVecs; ++c) {
      vecs[c] = load_once<kAccess>(row + offset(c), inside ? head_dim - channel(c) : 0);
    }
  }

  __device__ void store_row(T* row, const float2 (&values)[kPairs]) const {
#pragma unroll
    for (int c = 0; c < kVecs; ++c) {
      Vec16<T> vec;
#pragma unroll
      for (int i = 0; i < kVecPairs; ++i) vec.pairs[i] = from_floats<T>(values[c * kVecPairs + i]);
      store<kAccess>(row + offset(c), vec, head_dim - channel(c));
    }
  }

  // The first `width` channels of a row of constants, and `fill` for the others.
  __device__ void load_constant_row(float2 (&pairs)[kPairs], const float* row, int width, float2 fill) const {
#pragma unroll
    for (int c = 0; c < kVecs; ++c) {
      load_constants<kAccess, kVecPairs>(pairs + c * kVecPairs, row + offset(c), width - channel(c), fill);
    }
  }

  // scale * multiplier.
  __device__ void load_scale(float2 (&pairs)[kPairs], const QkNormRotaryOperand& operand, int head) const {
    const float* row = operand.scale + static_cast<std::int64_t>(head) * head_dim + first_channel();
    load_constant_row(pairs, row, operand.scale == nullptr ? 0 : head_dim, make_float2(1.0f, 1.0f));
#pragma unroll
    for (float2& pair : pairs) pair = pair * operand.multiplier;
  }

  // Channels from rotary_dim on pass through: times 1 plus 0 times their neighbour would spread an infinity. With
  // Access::kVec16 rotary_dim is a multiple of 4, and the two pairs of one load share the answer.
  __device__ bool is_rotated(int index) const {
    const int loaded = kAccess == Access::kVec16 ? index / 2 * 2 : index;
    return channel(loaded / kVecPairs) + 2 * (loaded % kVecPairs) < rotary_dim;
  }

  // Multiplies the rotations of token `seq` by their factors z. They are read late, from L1 after the first head, so
  // that they occupy no register during the wait for memory. With Access::kVec16 two factors are one access.
  __device__ void apply_factors(float2 (&rotation)[kPairs], const QkNormRotaryOperand& operand, int seq) const {
    if (operand.factors == nullptr) return;
    const float* row = operand.factors + static_cast<std::int64_t>(seq) * operand.factor_step + first_channel() / 2;
#pragma unroll
    for (int i = 0; i < kPairs; i += 2) {
      const float* source = row + (offset(i / kVecPairs) / 2 + i % kVecPairs);
      if constexpr (kAccess == Access::kVec16) {
        if (!is_rotated(i)) continue;
        const float2 two = __ldg(reinterpret_cast<const float2*>(source));
        rotation[i] = rotation[i] * two.x;
        rotation[i + 1] = rotation[i + 1] * two.y;
      } else {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          if (is_rotated(i + j)) rotation[i + j] = rotation[i + j] * __ldg(source + j);
        }
      }
    }
  }

  __device__ static float2 pair(const Vec16<T> (&vecs)[kVecs], int index) {
    return to_floats(vecs[index / kVecPairs].pairs[index % kVecPairs]);
  }
};

__device__ inline float2 rotate(float2 x, float2 rotation) {
  return make_float2(x.x * rotation.x - x.y * rotation.y, x.y * rotation.x + x.x * rotation.y);
}

__device__ inline float2 rotate_transposed(float2 x, float2 rotation) {
  return make_float2(x.x * rotation.x + x.y * rotation.y, x.y * rotation.x - x.x * rotation.y);
}

__device__ inline float add_dot(float sum, float2 a, float2 b) { return fmaf(a.x, b.x, fmaf(a.y, b.y, sum)); }

__device__ inline bool above_floor(float sum_of_squares) {
  return !(sum_of_squares < kNormFloor * kNormFloor);  // true for NaN, which must reach the result
}

// 1 / max(norm, floor).
template <typename T>
__device__ inline float inverse_norm(float sum_of_squares) {
  return above_floor(sum_of_squares) ? inverse_sqrt<T>(sum_of_squares) : 1.0f / kNormFloor;
}

// Six blocks on a multiprocessor, as many as without `step`: ptxas would move the element-wise loads of bfloat16 ahead,
// and use 111 registers.
template <typename T, Access kAccess, int kVecs, int kRows>
__global__ void __launch_bounds__(kThreads, kAccess == Access::kElement && sizeof(T) == 2 ? 6 : 0)
    qk_norm_rotary_forward_kernel(const __grid_constant__ QkNormRotaryParams params,
                                  const __grid_constant__ Plan plan) {
  using LaneSlice = Slice<T, kAccess, kVecs>;
  constexpr int kPairs = LaneSlice::kPairs;
  const bool is_q = blockIdx.x < plan.q.num_blocks;
  const QkNormRotaryOperand& operand = is_q ? params.q : params.k;
  const OperandPlan& operand_plan = is_q ? plan.q : plan.k;
  const unsigned block = is_q ? blockIdx.x : blockIdx.x - plan.q.num_blocks;
  Place place(operand_plan, operand.seqlen, plan.group_log2, block);
  const LaneSlice slice{place.lane, plan.group_log2, params.head_dim, params.rotary_dim};

  const T* x = place.row_of(static_cast<const T*>(operand.x), operand.x_stride) + slice.first_channel();
  T* out = place.row_of(static_cast<T*>(operand.out), operand.out_stride) + slice.first_channel();
  const int step = params.step == nullptr ? 0 : min(max(__ldg(params.step), 0), kMaxRotaryStep);
  const float* table =
      operand.table + (static_cast<std::int64_t>(place.seq) + step) * params.rotary_dim + slice.first_channel();
  float2 scale[kPairs];
  slice.load_scale(scale, operand, place.head);

  // The trip count is that of the whole block, because shuffles need whole warps.
  for (int first = 0; first < place.num_tokens; first += kRows * operand_plan.num_token_lanes) {
    // Step 1: every load of kRows rows, so that all are in flight together.
    Vec16<T> vecs[kRows][kVecs];
    float2 rotation[kRows][kPairs];
    int seq[kRows];
    T* out_row[kRows];
    bool inside[kRows];
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      inside[row] = place.token < place.num_tokens;
      slice.load_row(vecs[row], x, inside[row]);
      slice.load_constant_row(rotation[row], table, params.rotary_dim, make_float2(0.0f, 0.0f));
      seq[row] = place.seq;
      out_row[row] = out;
      const bool sequence_ends = place.next(operand_plan, operand.seqlen);
      x += operand_plan.x.over(sequence_ends);
      out += operand_plan.out.over(sequence_ends);
      table += operand_plan.table.over(sequence_ends);
    }

    // Step 2: the norms.
    float sum_of_squares[kRows] = {};
    if (params.normalize) {
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          const float2 value = slice.pair(vecs[row], i);
          sum_of_squares[row] = add_dot(sum_of_squares[row], value, value);
        }
      }
      sum_over_group(sum_of_squares, plan.group_log2);
    }

    // Step 3: normalise, scale, rotate.
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const float inverse = params.normalize ? inverse_norm<T>(sum_of_squares[row]) : 1.0f;
      slice.apply_factors(rotation[row], operand, seq[row] + step);
      float2 result[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float2 scaled = slice.pair(vecs[row], i) * inverse * scale[i];
        result[i] = slice.is_rotated(i) ? rotate(scaled, rotation[row][i]) : scaled;
      }
      if (inside[row]) slice.store_row(out_row[row], result);
    }
  }
}

// Adds the groups' sums head by head, in the order of their token lanes, and writes the block's part of a run.
template <typename LaneSlice>
__device__ inline void write_dscale(const float2 (&dscale)[LaneSlice::kPairs], const LaneSlice& slice,
                                    const Place& place, const OperandPlan& plan, int num_heads, float multiplier,
                                    float* partial) {
  constexpr int kVecPairs = LaneSlice::kVecPairs;
  __shared__ float2 sums[kThreads * LaneSlice::kPairs];  // (token lane, head of the tile, channel)
  static_assert(sizeof sums <= 8 * 1024, "must not limit the blocks per multiprocessor");
  const int padded_head_dim = 2 * LaneSlice::kPairs << slice.group_log2;
  const int group = static_cast<int>(threadIdx.x) >> slice.group_log2;
#pragma unroll
  for (int i = 0; i < LaneSlice::kPairs; ++i) {
    sums[(group * padded_head_dim + slice.channel(i / kVecPairs)) / 2 + i % kVecPairs] = dscale[i];
  }
  __syncthreads();  // the sums of all groups are complete

  const float* group_sums = reinterpret_cast<const float*>(sums);
  const int tile_heads = 1 << plan.tile_heads_log2;
  partial += (place.run * num_heads + (place.head - place.head_in_tile)) * slice.head_dim;
  for (int i = static_cast<int>(threadIdx.x); i < tile_heads * slice.head_dim; i += kThreads) {
    const int head_in_tile = i / slice.head_dim;
    const int channel = i - head_in_tile * slice.head_dim;
    float sum = 0.0f;
    for (int token_lane = 0; token_lane < plan.num_token_lanes; ++token_lane) {
      sum += group_sums[(token_lane * tile_heads + head_in_tile) * padded_head_dim + channel];
    }
    partial[i] = sum * multiplier;
  }
}

template <typename T, Access kAccess, int kVecs>
__global__ void __launch_bounds__(kThreads)
    qk_norm_rotary_backward_kernel(const __grid_constant__ QkNormRotaryBackwardParams params,
                                   const __grid_constant__ Plan plan) {
  using LaneSlice = Slice<T, kAccess, kVecs>;
  constexpr int kPairs = LaneSlice::kPairs;
  const bool is_q = blockIdx.x < plan.q.num_blocks;
  const QkNormRotaryBackwardOperand& operand = is_q ? params.q : params.k;
  const QkNormRotaryOperand& forward = operand.forward;
  const OperandPlan& operand_plan = is_q ? plan.q : plan.k;
  const unsigned block = is_q ? blockIdx.x : blockIdx.x - plan.q.num_blocks;
  Place place(operand_plan, forward.seqlen, plan.group_log2, block);
  const LaneSlice slice{place.lane, plan.group_log2, params.head_dim, params.rotary_dim};

  const T* x = place.row_of(static_cast<const T*>(forward.x), forward.x_stride) + slice.first_channel();
  const T* dout = place.row_of(static_cast<const T*>(operand.dout), operand.dout_stride) + slice.first_channel();
  T* dx = place.row_of(static_cast<T*>(operand.dx), operand.dx_stride) + slice.first_channel();
  const float* table = forward.table + static_cast<std::int64_t>(place.seq) * params.rotary_dim + slice.first_channel();
  float2 scale[kPairs];
  slice.load_scale(scale, forward, place.head);
  float2 dscale[kPairs] = {};

  // The trip count is that of the whole block, because shuffles need whole warps.
  for (int first = 0; first < place.num_tokens; first += operand_plan.num_token_lanes) {
    // Step 1: loads. A row past the end is zeros: it adds nothing to dscale.
    const bool inside = place.token < place.num_tokens;
    Vec16<T> vecs[kVecs], dout_vecs[kVecs];
    float2 rotation[kPairs];
    slice.load_row(vecs, x, inside);
    slice.load_row(dout_vecs, dout, inside);
    slice.load_constant_row(rotation, table, params.rotary_dim, make_float2(0.0f, 0.0f));
    slice.apply_factors(rotation, forward, place.seq);

    // Step 2: g, ||x||^2 and <x, e>.
    float2 g[kPairs];
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 value = slice.pair(vecs, i);
      const float2 gradient = slice.pair(dout_vecs, i);
      g[i] = slice.is_rotated(i) ? rotate_transposed(gradient, rotation[i]) : gradient;
      sums[0] = add_dot(sums[0], value, value);
      sums[1] = add_dot(sums[1], value, g[i] * scale[i]);
    }
    if (params.normalize) sum_over_group(sums, plan.group_log2);
    // A row whose g is 0, a hidden key for instance, adds nothing, even where it holds a NaN (0 * NaN).
    if (__any_sync(kWholeWarp, isnan(sums[1]))) {
      float used[1] = {0.0f};
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (g[i].x != 0.0f || g[i].y != 0.0f) used[0] = 1.0f;
      }
      if (params.normalize) sum_over_group(used, plan.group_log2);
      if (used[0] == 0.0f) {
        sums[0] = sums[1] = 0.0f;
#pragma unroll
        for (Vec16<T>& vec : vecs) vec = Vec16<T>{};
      }
    }

    // Step 3: both gradients. In this order: inverse may be 1e12, and its cube does not fit a float.
    const float inverse = params.normalize ? inverse_norm<T>(sums[0]) : 1.0f;
    const float along = above_floor(sums[0]) ? sums[1] * inverse : 0.0f;  // <x_hat, e>
    float2 result[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float2 x_hat = slice.pair(vecs, i) * inverse;
      dscale[i] = dscale[i] + g[i] * x_hat;
      result[i] = g[i] * scale[i];
      if (params.normalize) result[i] = (result[i] - x_hat * along) * inverse;
    }
    if (inside) slice.store_row(dx, result);

    const bool sequence_ends = place.next(operand_plan, forward.seqlen);
    x += operand_plan.x.over(sequence_ends);
    dout += operand_plan.dout.over(sequence_ends);
    dx += operand_plan.out.over(sequence_ends);
    table += operand_plan.table.over(sequence_ends);
  }

  if (operand.dscale_partial != nullptr) {
    write_dscale(dscale, slice, place, operand_plan, forward.num_heads, forward.multiplier, operand.dscale_partial);
  }
}

}  // namespace andromeda::cuda
