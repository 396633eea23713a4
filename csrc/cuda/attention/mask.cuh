// Which keys a query row sees (docs/attention.md#mask has the figure): the keys of a row, the range of keys of a set of
// rows, and the mask of a tile of scores.
#pragma once

#include <climits>
#include <cstdint>

#include "andromeda/attention.h"
#include "attention/softmax.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kUnlimited = INT_MAX;

// A head's constants. Keys at the distance `window` or farther together hold less than 2^-24 of the softmax of a row
// that sees its own key: they are a geometric sum of exp(2 bound - slope * distance) (docs/attention.md#windows).
struct Head {
  float slope;  // per key, natural units
  float bound;  // on |softmax_scale <q, k>|; infinite when unknown
  int window;   // in keys; kUnlimited without a bound or a bias
};

__device__ inline Head describe_head(float slope, float bound) {
  Head result{slope, kInfinity, kUnlimited};
  if (bound >= 0.0f) result.bound = bound;  // a NaN is no bound
  // Rounded up, plus one: float32 is not exact, and a key too many is harmless.
  const float window = ceilf((2.0f * bound + 16.6355324f) / result.slope) + 1.0f;  // 24 ln 2
  if (result.slope > 0.0f && window < 1e9f) result.window = static_cast<int>(window);
  return result;
}

__device__ inline Head describe_head(const AttentionParams& params, int head) {
  const float slope = params.alibi_slopes == nullptr ? 0.0f : __ldg(params.alibi_slopes + head);
  if (params.logit_bound == nullptr) return {slope, kInfinity, kUnlimited};
  return describe_head(slope, __ldg(params.logit_bound + head));
}

// One query row of one batch entry: it sees the keys first <= j < end and is aligned with the key at `position`. A row
// that does not exist sees every key: its result is dropped, and it must not force a mask on the other rows.
//
// describe_row() ignores the window. A KeyRange applies it, but to whole tiles: a row may see more keys than its window
// has. The CPU kernels differ: their describe_row() applies it key by key.
struct Row {
  int position, first, end;
  __device__ bool empty() const { return first >= end; }
  __device__ bool sees_itself() const { return first <= position && position < end; }
};

// The first key that key_start permits the row to see.
__device__ inline int load_key_start(const AttentionParams& params, int batch, int query) {
  if (params.key_start == nullptr || query >= params.seqlen_q) return 0;
  return __ldg(params.key_start + static_cast<std::int64_t>(batch) * params.seqlen_q + query);
}

// num_keys: the keys that exist.
__device__ inline Row describe_row(const AttentionParams& params, int query, int num_keys, int key_start) {
  Row row;
  row.position = query + (num_keys - params.seqlen_q);
  row.first = 0;
  row.end = num_keys;
  if (query >= params.seqlen_q) return row;
  row.first = max(key_start, 0);
  if (params.causal) row.end = min(row.end, row.position + 1);
  if (row.empty()) row.first = kUnlimited, row.end = 0;  // masked in every tile
  return row;
}

__device__ inline Row describe_row(const AttentionParams& params, int batch, int query) {
  return describe_row(params, query, params.seqlen_k, load_key_start(params, batch, query));
}

// The part of a Row that `apply_mask` needs.
struct VisibleKeys {
  int first, end;
};

// The keys of a set of rows. Some row sees the keys from `begin` to `end`, less those beyond its window: tiles outside
// are skipped. All rows see the keys from `unmasked_begin` to `unmasked_end`: tiles inside need no mask.
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

  // The range of the rows of all lanes together, in all lanes.
  __device__ KeyRange of_warp() const {
    return {__reduce_min_sync(kWholeWarp, begin), __reduce_max_sync(kWholeWarp, end),
            __reduce_max_sync(kWholeWarp, unmasked_begin), __reduce_min_sync(kWholeWarp, unmasked_end)};
  }

  __device__ KeyRange join(const KeyRange& other) const {
    return {min(begin, other.begin), max(end, other.end), max(unmasked_begin, other.unmasked_begin),
            min(unmasked_end, other.unmasked_end)};
  }

  __device__ bool touches(int key, int count) const { return key < end && key + count > begin; }
  __device__ bool is_unmasked(int key, int count) const { return unmasked_begin <= key && key + count <= unmasked_end; }
};

// Sets the scores of keys that a row does not see to -inf. This comes after the product, so that a NaN in a hidden key
// does not survive. `rows`: those of the block's tile in shared memory, from the warp's first row on, each a Row or a
// VisibleKeys. `gradients`: those of the weights, or nothing; they become 0 at the same places.
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
