// The softmax of the attention kernels.
//
// Scores are kept in units of <q, k>: the bias is divided by softmax_scale. The weight of a score is
//
//   2^(score * softmax_scale_log2 - exponent of the row),   softmax_scale_log2 = softmax_scale * log2(e)
//
// The exponent of a row is that of its largest score so far (online), or a constant where the head's logits have a
// small bound (bounded, docs/attention.md#bounded-softmax). Inside a kernel the log-sum-exp is in base 2.
#pragma once

#include <cuda_fp16.h>

#include <limits>
#include <type_traits>

#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Bounded softmax takes 2^(score * softmax_scale_log2) as it is. The numbers that a row may sum are then between 2^-126
// and 2^126 in bfloat16 and float32. float16 is normal from 2^-14 on: a row whose own key has the smallest weight, e^-7
// = 2^-10, keeps its neighbours, which a bias makes smaller still, to 4 bits less than the own key.
template <typename T>
inline constexpr float kMaxBound = std::is_same_v<T, __half> ? 7.0f : 40.0f;

// A row that has not seen a key has no maximum, and only scores of -inf: relative to any finite number its weights are
// 0.
__device__ inline float finite_max(float row_max) { return row_max == -kInfinity ? 0.0f : row_max; }

// One number for each row of a lane: [row_tile][half] is that of row 16 * row_tile + 8 * half + lane / 4 (mma.cuh).
template <int kRowTiles>
using RowValues = float[kRowTiles][2];

template <int kRowTiles>
__device__ inline void add_to(float (&sums)[kRowTiles][2], const float (&addends)[kRowTiles][2]) {
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) sums[row_tile][half] += addends[row_tile][half];
  }
}

// The unit of the maxima: that of scores, or exponents of 2, which blocks can compare.
enum class MaxUnit { kScore, kLog2 };

// Online softmax of the rows of a warp. For each tile of scores:
//
//   if (softmax.update(scores)) { softmax.rescale(out); softmax.rescale(sum); }    from the old maxima to the new ones
//   softmax.exponentiate(scores, sum);                                             scores become weights
//   out += weights v
template <int kRowTiles, MaxUnit kUnit>
struct OnlineSoftmax {
  float softmax_scale_log2;
  RowValues<kRowTiles> row_max;  // of the scores so far; -inf before the first visible key
  RowValues<kRowTiles> factor;   // of the last update: rescales a sum from the old maximum to the new one

  // Raises the maxima to those of the scores, and returns whether any of the warp has grown: often at first and seldom
  // later. If none has, the output, most of the registers, is left alone. (The factors are computed before the vote:
  // after it, the forward kernel would spill.)
  template <int kColumnTiles>
  __device__ bool update(const float (&scores)[kRowTiles][kColumnTiles][4]) {
    bool grew = false;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float largest = fmaxf(scores[row_tile][0][2 * half], scores[row_tile][0][2 * half + 1]);
#pragma unroll
        for (int n = 1; n < kColumnTiles; ++n) {
          largest = fmaxf(largest, fmaxf(scores[row_tile][n][2 * half], scores[row_tile][n][2 * half + 1]));
        }
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));  // a row lies in four lanes
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
        const float old = row_max[row_tile][half];
        const float maximum = fmaxf(old, kUnit == MaxUnit::kLog2 ? largest * softmax_scale_log2 : largest);
        factor[row_tile][half] = exp2_approx(to_log2(old - finite_max(maximum)));
        row_max[row_tile][half] = maximum;
        grew |= maximum > old;
      }
    }
    return __any_sync(kWholeWarp, grew) != 0;
  }

  template <int kColumnTiles>
  __device__ void rescale(float (&sums)[kRowTiles][kColumnTiles][4]) const {
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[row_tile][n][i] *= factor[row_tile][i / 2];
      }
    }
  }

  __device__ void rescale(RowValues<kRowTiles>& sums) const {
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) sums[row_tile][half] *= factor[row_tile][half];
    }
  }

  // Scores become weights, which are added to the `sum` of their row.
  template <int kColumnTiles>
  __device__ void exponentiate(float (&scores)[kRowTiles][kColumnTiles][4], RowValues<kRowTiles>& sum) const {
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      const float exponents[2] = {exponent(row_tile, 0), exponent(row_tile, 1)};
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& score = scores[row_tile][n][i];
          score = exp2_approx(fmaf(score, softmax_scale_log2, -exponents[i / 2]));
          sum[row_tile][i / 2] += score;
        }
      }
    }
  }

  // The exponent of 2 that a row's weights are relative to.
  __device__ float exponent(int row_tile, int half) const {
    const float maximum = row_max[row_tile][half];
    return maximum == -kInfinity ? 0.0f : to_log2(maximum);
  }

  __device__ float to_log2(float maximum) const {
    return kUnit == MaxUnit::kLog2 ? maximum : maximum * softmax_scale_log2;
  }
};

}  // namespace andromeda::cuda
