// attention, backward: dq, and the numbers of every query row that the dk, dv kernel needs. backward.cuh has the
// formulas.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "attention/alibi.cuh"
#include "attention/backward.cuh"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

// <a, b> of row `row` of two tiles.
template <typename T, int kHeadDim>
__device__ inline float multiply_rows(std::uint32_t a, std::uint32_t b, int row) {
  float sum = 0.0f;
#pragma unroll 2
  for (int vec = 0; vec < kHeadDim / kVec16Width<T>; ++vec) {
    const std::uint32_t offset = vec_offset<kQueryRows>(row, vec);
    const Vec16<T> x = load_shared<T>(a + offset), y = load_shared<T>(b + offset);
#pragma unroll
    for (int j = 0; j < Vec16<T>::kPairs; ++j) {
      const float2 left = to_floats(x.pairs[j]), right = to_floats(y.pairs[j]);
      sum = fmaf(left.x, right.x, sum);
      sum = fmaf(left.y, right.y, sum);
    }
  }
  return sum;
}

// The lane's place: its warp's first row of the tile, and its own first row and column of a result (mma.cuh).
struct QueryPlace {
  int warp_row, row, column;

  __device__ static QueryPlace read() {
    const int thread = read_thread_index(), lane = thread % kWarpLanes;
    return {thread / kWarpLanes * kQueryWarpRows, lane >> 2, 2 * (lane & 3)};
  }
};

// kStages: how many tiles of k, and of v, are in shared memory.
template <typename T, int kHeadDim, int kStages>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocksPerSm<kHeadDim>)
    attention_backward_dq_kernel(const __grid_constant__ AttentionBackwardParams params,
                                 const __grid_constant__ BackwardPlan plan) {
  constexpr int kKeys = kQueryKeys;
  constexpr int kColumnTiles = kKeys / 8;  // of an accumulator
  constexpr std::uint32_t kStageBytes = 2 * kTileBytes<kKeys, kHeadDim>;
  static_assert(kStages == 1 || kStages == 2);
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  __shared__ VisibleKeys visible[kQueryRows];
  const std::uint32_t q_tile = shared_address(shared);
  const std::uint32_t dout_tile = q_tile + kTileBytes<kQueryRows, kHeadDim>;
  const std::uint32_t v_tile = dout_tile + kTileBytes<kQueryRows, kHeadDim>;
  const std::uint32_t k_tile = v_tile + kTileBytes<kKeys, kHeadDim>;
  // The ranges of the warps lie at the end of the key tiles, which are loaded later: `visible` takes the KiB that two
  // blocks of 80 KiB leave free on 8.0.
  KeyRange* key_ranges = reinterpret_cast<KeyRange*>(shared + kQuerySharedBytes<kHeadDim, kStages>) - kBackwardWarps;

  const AttentionParams& forward = params.forward;
  const QueryBlock block = QueryBlock::read(forward, plan);
  const int batch = block.batch, head = block.head, query = block.query;
  const auto of_queries = [&](const void* data, const SeqStrides& stride) {
    return rows_of<const T>(data, stride, batch, head, forward.seqlen_q, forward.head_dim, plan.is_aligned16);
  };
  const auto of_keys = [&](const void* data, const SeqStrides& stride) {
    return rows_of<const T>(data, stride, batch, block.kv_head, forward.seqlen_k, forward.head_dim, plan.is_aligned16);
  };
  const Rows<const T> k = of_keys(forward.k, forward.k_stride), v = of_keys(forward.v, forward.v_stride);
  load_tile<kQueryRows, kHeadDim, kBackwardThreads>(dout_tile, of_queries(params.dout, params.dout_stride), query);
  load_tile<kQueryRows, kHeadDim, kBackwardThreads>(q_tile, of_queries(forward.out, forward.out_stride), query);
  cp_async_commit();

  // Find the keys that the rows see, one row per lane.
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes, own = static_cast<int>(threadIdx.x);
  const Head constants = describe_head(forward, head);
  const float slope_log2 = constants.slope * kLog2E;
  const Row row = describe_row(forward, batch, query + own);
  const bool exists = query + own < forward.seqlen_q;
  const KeyRange key_range = KeyRange::of(row, exists, constants.window).of_warp();
  visible[own] = {row.first, row.end};
  if (lane == 0) key_ranges[warp] = key_range;
  const std::int64_t head_index = static_cast<std::int64_t>(batch) * forward.num_heads + head;
  // A row that sees no key has no lse. It is masked everywhere: 0 keeps its exponents free of NaN.
  const float lse =
      exists && !row.empty() ? __ldg(forward.softmax_lse + head_index * forward.seqlen_q + query + own) : 0.0f;
  const float lse_log2 = lse * kLog2E;
  cp_async_wait<0>();
  __syncthreads();  // visible keys, key ranges and the tiles of dout and out (in the place of q) are complete
  const float minus_delta = -multiply_rows<T, kHeadDim>(dout_tile, q_tile, own);
  KeyRange all = key_ranges[0];
#pragma unroll
  for (int i = 1; i < kBackwardWarps; ++i) all = all.join(key_ranges[i]);

  // Write the numbers for the dk, dv kernel. Two warps describe one of its tiles, which may not exist.
  if (const int tile = (query + own) / kBackwardTile; tile < plan.num_query_tiles) {
    const std::int64_t index = tile_index(forward, plan, batch, head, tile);
    const int tile_row = own % kBackwardTile;
    if (tile_row == 0) plan.key_ranges[index] = key_ranges[warp].join(key_ranges[warp + 1]);
    QueryTile& target = plan.tiles[index];
    target.lse[tile_row] = exists && !row.empty()
                               ? fmaf(slope_log2, static_cast<float>(tile_row), lse_log2) - kWeightScaleLog2<T>
                               : kInfinity;
    target.minus_delta[tile_row] = minus_delta;
    target.first[tile_row] = exists ? row.first : kUnlimited;
    target.end[tile_row] = exists ? row.end : 0;
  }

  // A lane's rows: g and g + 8 of each of the warp's row tiles.
  float lse_of[kQueryRowTiles][2], minus_delta_of[kQueryRowTiles][2];
#pragma unroll
  for (int row_tile = 0; row_tile < kQueryRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int source = 16 * row_tile + 8 * half + lane / 4;
      minus_delta_of[row_tile][half] = __shfl_sync(kWholeWarp, minus_delta, source);
      lse_of[row_tile][half] = __shfl_sync(kWholeWarp, lse_log2, source) - lowered_by(half) * slope_log2;
    }
  }
  const float raw_slope = constants.slope / forward.softmax_scale;

  float dq[kQueryRowTiles][kHeadDim / 8][4] = {}, scale = kFirstGradientScale<T>;
  const int first_tile = uniform(all.begin / kKeys * kKeys);
  int key = uniform(all.begin < all.end ? (all.end - 1) / kKeys * kKeys : -kKeys);
  const auto load_keys = [&](std::uint32_t tile, const Rows<const T>& rows, int first) {
    if (first >= first_tile) load_tile<kKeys, kHeadDim, kBackwardThreads>(tile, rows, first);
  };
  __syncthreads();  // everyone has finished with out and the key ranges
  if (key >= first_tile) {
    load_tile<kQueryRows, kHeadDim, kBackwardThreads>(q_tile, of_queries(forward.q, forward.q_stride), query);
    load_keys(v_tile, v, key);
    if constexpr (kStages == 2) load_keys(k_tile, k, key);
  }
  cp_async_commit();
  std::uint32_t stage = 0;  // in bytes
#pragma unroll 1
  for (; key >= first_tile; key -= kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // v (with two stages also k) has arrived; everyone has finished with the previous k (and v)
    if constexpr (kStages == 2) {
      load_keys(v_tile + (stage ^ kStageBytes), v, key - kKeys);
      load_keys(k_tile + (stage ^ kStageBytes), k, key - kKeys);
    } else {
      load_keys(k_tile, k, key);
    }
    cp_async_commit();
    const bool touched = key_range.touches(key, kKeys);  // uniform in a warp
    const QueryPlace place = QueryPlace::read();
    float ds[kQueryRowTiles][kColumnTiles][4];
    if (touched) {  // dP - delta
#pragma unroll
      for (int row_tile = 0; row_tile < kQueryRowTiles; ++row_tile) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[row_tile][n][i] = minus_delta_of[row_tile][i / 2];
        }
      }
      multiply_transposed<T, kHeadDim, kQueryRows, kKeys>(ds, dout_tile, place.warp_row, v_tile + stage);
    }
    if constexpr (kStages == 1) {
      cp_async_wait<0>();
      __syncthreads();  // k has arrived; everyone has finished with v
      load_keys(v_tile, v, key - kKeys);
      cp_async_commit();
    }
    if (touched) {
      const int warp_position = query + place.warp_row + (forward.seqlen_k - forward.seqlen_q);
      const int position = warp_position + place.row, lane_key = key + place.column;
      float scores[kQueryRowTiles][kColumnTiles][4];
      seed_bias(scores, raw_slope, position, lane_key);
      // In two halves: unrolled as a whole, it would load its operands so early that it runs out of registers.
      multiply_transposed<T, kHeadDim, kQueryRows, kKeys, kQueryRowTiles, kHeadDim / 32>(scores, q_tile, place.warp_row,
                                                                                         k_tile + stage);
      const bool left_of_diagonal = forward.causal || key + kKeys - 1 <= warp_position;
      if (!left_of_diagonal) mirror_bias(scores, raw_slope, position, lane_key);
      const bool unmasked = key_range.is_unmasked(key, kKeys);
      if (!unmasked) apply_mask(scores, visible + place.warp_row, lane_key, ds);
#pragma unroll
      for (int row_tile = 0; row_tile < kQueryRowTiles; ++row_tile) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ds[row_tile][n][i] *=
                exp2_approx(fmaf(scores[row_tile][n][i], plan.softmax_scale_log2, -lse_of[row_tile][i / 2]));
          }
        }
      }
      scale_gradients<T>(ds, dq, scale);
      const auto add_to_dq = [&](auto clamped) {
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
          std::uint32_t operand[kQueryRowTiles][4];
#pragma unroll
          for (int row_tile = 0; row_tile < kQueryRowTiles; ++row_tile)
            pack_operand<T>(operand[row_tile], ds[row_tile], step);
          multiply_step<T, kHeadDim, kKeys, kQueryRowTiles, decltype(clamped)::value>(dq, operand, k_tile + stage,
                                                                                      step);
        }
      };
      if (unmasked) {
        add_to_dq(std::false_type{});
      } else {
        add_to_dq(std::true_type{});
      }
    }
    if constexpr (kStages == 2) stage ^= kStageBytes;
  }
  const float unscale = forward.softmax_scale / scale;
  const float factor[kQueryRowTiles][2] = {{unscale, unscale}, {unscale, unscale}};
  const QueryBlock owned = QueryBlock::read(forward, plan);  // the same as `block`
  const int warp_row = QueryPlace::read().warp_row;
  const Rows<T> dq_rows = rows_of<T>(params.dq, params.dq_stride, owned.batch, owned.head, forward.seqlen_q,
                                     forward.head_dim, plan.is_aligned16);
  store_rows<T, kHeadDim, kQueryRows>(dq_rows, owned.query + warp_row, dq, factor, q_tile, warp_row);
}

}  // namespace andromeda::cuda
