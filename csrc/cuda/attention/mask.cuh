// Which keys a query row sees (docs/attention.md#mask): the keys of a row, the range of a set of rows, and the mask that
// is applied to a tile of scores.
#pragma once

#include <climits>
#include <cstdint>

#include "andromeda/attention.h"
#include "attention/softmax.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kUnlimited = INT_MAX;

// A head's constants. `window`: keys at this distance or farther together hold less than 2^-24 of a row's softmax if
// the row sees its own key: exp(2 bound - slope * distance), a geometric sum (docs/attention.md#windows).
struct Head {
  float slope;  // per key, natural units
  float bound;  // on |softmax_scale <q, k>|; infinite when unknown
  int window;   // in keys; kUnlimited without a bound or a bias
};

__device__ inline Head describe_head(const AttentionParams& params, int head) {
  Head result{0.0f, kInfinity, kUnlimited};
  if (params.alibi_slopes != nullptr) result.slope = __ldg(params.alibi_slopes + head);
  if (params.logit_bound == nullptr) return result;
  const float bound = __ldg(params.logit_bound + head);
  if (bound >= 0.0f) result.bound = bound;  // a NaN promises nothing
  // Rounded up and one more: float32 need not be exact, keeping a key too many is harmless.
  const float window = ceilf((2.0f * bound + 16.6355324f) / result.slope) + 1.0f;  // 24 ln 2
  if (result.slope > 0.0f && window < 1e9f) result.window = static_cast<int>(window);
  return result;
}

// One query row of one batch entry: it sees keys first <= j < end. `position` is the key it is aligned with. A row that
// does not exist sees everything: its result is dropped, and it must not make others mask.
struct Row {
  int position, first, end;
  __device__ bool empty() const { return first >= end; }
  __device__ bool sees_itself() const { return first <= position && position < end; }
};

__device__ inline Row describe_row(const AttentionParams& params, int batch, int query) {
  Row row;
  row.position = query + (params.seqlen_k - params.seqlen_q);
  row.first = 0;
  row.end = params.seqlen_k;
  if (query >= params.seqlen_q) return row;
  if (params.key_start != nullptr) {
    row.first = max(__ldg(params.key_start + static_cast<std::int64_t>(batch) * params.seqlen_q + query), 0);
  }
  if (params.causal) row.end = min(row.end, row.position + 1);
  if (row.empty()) row.first = kUnlimited, row.end = 0;  // masked in every tile
  return row;
}

// What `apply_mask` needs of a Row.
struct VisibleKeys {
  int first, end;
};

// Keys that some of a set of rows see (`begin`, `end`: tiles outside are skipped; the window is taken off), and keys
// that all of them see (`unmasked_begin`, `unmasked_end`: tiles inside need no mask).
struct KeyRange {
  int begin, end, unmasked_begin, unmasked_end;

  __device__ static KeyRange of(const Row& row, bool exists, int window) {
    if (!exists) return {kUnlimited, 0, 0, kUnlimited};
    KeyRange key_range{row.first, row.end, row.first, row.end};
    if (!row.empty() && row.sees_itself() && window != kUnlimited) {
      key_range.begin = max(key_range.begin, row.position - window + 1);
      key_range.end =
          min(key_range.end,
              static_cast<int>(min(static_cast<long long>(row.position) + window, static_cast<long long>(kUnlimited))));
    }
    return key_range;
  }

  // The reach of the rows of all lanes together, in all lanes.
  __device__ KeyRange of_warp() const {
    return {__reduce_min_sync(kWholeWarp, begin), __reduce_max_sync(kWholeWarp, end),
            __reduce_max_sync(kWholeWarp, unmasked_begin), __reduce_min_sync(kWholeWarp, unmasked_end)};
  }

  __device__ bool touches(int key, int count) const { return key < end && key + count > begin; }
  __device__ bool is_unmasked(int key, int count) const { return unmasked_begin <= key && key + count <= unmasked_end; }
};

// Hides, after the product, what a row does not see: a NaN in a hidden key must not survive. `rows` are those of the
// block's tile in shared memory, from the warp's first row on, each a Row or a VisibleKeys.
//
// `gradients`: of the weights, or nothing; what is hidden becomes 0.
template <int kRowTiles, int kColumnTiles, typename R, typename... Gradients>
__device__ inline void apply_mask(float (&scores)[kRowTiles][kColumnTiles][4], const R* rows, int key,
                                  Gradients&... gradients) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const R& row = rows[row_tile * 16 + half * 8 + (lane >> 2)];
      const int first = row.first - key, end = row.end - key;
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + i;
          if (column < first || column >= end) {
            scores[row_tile][n][2 * half + i] = -kInfinity;
            ((gradients[row_tile][n][2 * half + i] = 0.0f), ...);
          }
        }
      }
    }
  }
}

}  // namespace andromeda::cuda
