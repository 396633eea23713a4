// The bias of attention, -slope * |position - key|, in the accumulators of a product (docs/attention.md#alibi).
#pragma once

namespace andromeda::cuda {

// Sets the accumulators of a product to -slope * (position - key) / softmax_scale, so that the bias costs nothing after
// it (`raw_slope` is slope / softmax_scale). This is right for keys at or left of the diagonal; `mirror_bias` corrects
// the others. A lane holds rows r and r + 8 of each row tile; `position` is that of its row r of row tile 0, and `key`
// that of its first column.
//
// Both rows share one value, -slope * (position + 8 - key): adding a constant to a row leaves its softmax unchanged,
// and for row r the constant is -8 slope. `lowered_by` undoes it in the log-sum-exp. A value shared by more rows
// would underflow: 127 rows of slope 0.7 are 130 bits.
template <int kRowTiles, int kColumnTiles>
__device__ inline void seed_bias(float (&scores)[kRowTiles][kColumnTiles][4], float raw_slope, int position, int key) {
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    const float distance = static_cast<float>(key - (position + row_tile * 16 + 8));  // exact: computed in integers
    const float base = raw_slope * distance;
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scores[row_tile][n][i] = scores[row_tile][n][i + 2] = fmaf(raw_slope, static_cast<float>(8 * n + i), base);
      }
    }
  }
}

// The bias of row r (half 0) and r + 8 (half 1) is computed for a row that is this many rows further down.
__device__ constexpr float lowered_by(int half) { return half == 0 ? 8.0f : 0.0f; }

// Corrects, after the product, the bias of keys right of the diagonal, where it falls again.
template <int kRowTiles, int kColumnTiles>
__device__ inline void mirror_bias(float (&scores)[kRowTiles][kColumnTiles][4], float raw_slope, int position,
                                   int key) {
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float distance = static_cast<float>(key - (position + row_tile * 16 + half * 8));
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float beyond = fmaxf(distance + static_cast<float>(8 * n + i), 0.0f);
          float& score = scores[row_tile][n][2 * half + i];
          score = fmaf(-2.0f * raw_slope, beyond, score);
        }
      }
    }
  }
}

}  // namespace andromeda::cuda
