// attention, backward: dk and dv, and their sum over splits of the query heads. backward.cuh has the formulas.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/backward.cuh"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

// The kRows keys of a block, and their head. The longest work comes first: under a causal mask most queries see the
// first keys.
template <int kRows>
struct KeyBlock {
  int batch, kv_head, head_split, key;

  // blockIdx.x is read again after the loop, which then keeps nothing in registers that it does not need.
  __device__ static KeyBlock read(const AttentionParams& params, const BackwardPlan& plan) {
    unsigned block;
    asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(block));
    KeyBlock result;
    result.batch = block % params.batch;
    block /= params.batch;
    result.kv_head = block % params.num_kv_heads;
    block /= params.num_kv_heads;
    result.head_split = block % plan.num_head_splits;
    result.key = block / plan.num_head_splits * kRows;
    return result;
  }
};

// Walks over the query tiles that touch the keys of a block, head by head of a split. The key ranges of 32 tiles are
// read at once, one per lane; the state is the same in all lanes and warps.
struct QueryTileIterator {
  int head, tile;
  unsigned touched, unmasked;  // of the 32 tiles around `tile`: bits of those still to come, of those without a mask

  __device__ bool is_unmasked() const { return (unmasked >> (tile % kWarpLanes) & 1) != 0; }

  // Goes on to the next tile, or at the end to a head beyond those of the split.
  __device__ void advance(const AttentionParams& params, const BackwardPlan& plan, int batch, int heads_end, int key) {
    int first_tile = tile / kWarpLanes * kWarpLanes;
    while (touched == 0) {
      first_tile += kWarpLanes;
      if (first_tile >= plan.num_query_tiles) {
        head += plan.num_head_splits;
        if (head >= heads_end) return;
        // Under a causal mask no query before position `key` sees the block.
        const int first_query = params.causal ? max(key - (params.seqlen_k - params.seqlen_q), 0) : 0;
        first_tile = first_query / (kBackwardTile * kWarpLanes) * kWarpLanes;
      }
      const int lane_tile = first_tile + read_thread_index() % kWarpLanes;
      KeyRange key_range{kUnlimited, 0, 0, kUnlimited};
      if (lane_tile < plan.num_query_tiles)
        key_range = plan.key_ranges[tile_index(params, plan, batch, head, lane_tile)];
      touched = __ballot_sync(kWholeWarp, key_range.touches(key, kBackwardTile));
      unmasked = __ballot_sync(kWholeWarp, key_range.is_unmasked(key, min(kBackwardTile, params.seqlen_k - key)));
    }
    tile = first_tile + __ffs(touched) - 1;
    touched &= touched - 1;
  }
};

// Turns scores into the exponents of the weights, which are multiplied by kWeightScale. Rows are keys, columns are
// queries; `distance` is the key of the lane's row g - the position of the tile's query 0.
//
// Left of the diagonal, -slope_log2 * (position - key) - lse is one difference, slope_log2 * distance - (lse +
// slope_log2 * column), whose right side the dq kernel has prepared.
__device__ inline void scores_to_log2_weights(float (&scores)[kBackwardTile / 8][4], const QueryTile& tile,
                                              float softmax_scale_log2, float slope_log2, int distance,
                                              bool left_of_diagonal) {
  const int column = read_thread_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kBackwardTile / 8; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(tile.lse + 8 * n + column);
    const float lse_of[2] = {lse.x, lse.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float row_distance = static_cast<float>(distance + i / 2 * 8);
      const float query = static_cast<float>(column + 8 * n + i % 2);
      const float exponent =
          left_of_diagonal ? fmaf(slope_log2, row_distance, -lse_of[i % 2])
                           : fmaf(-slope_log2, fabsf(row_distance - query), fmaf(slope_log2, query, -lse_of[i % 2]));
      scores[n][i] = fmaf(scores[n][i], softmax_scale_log2, exponent);
    }
  }
}

// Sets elements whose query does not see the key to `value`; `key` is that of the lane's row g.
__device__ inline void apply_key_mask(float (&scores)[kBackwardTile / 8][4], const QueryTile& tile, int key,
                                      float value) {
  const int column = read_thread_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kBackwardTile / 8; ++n) {
    const int2 first = *reinterpret_cast<const int2*>(tile.first + 8 * n + column);
    const int2 end = *reinterpret_cast<const int2*>(tile.end + 8 * n + column);
    const int first_of[2] = {first.x, first.y}, end_of[2] = {end.x, end.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row_key = key + i / 2 * 8;
      const bool hidden = row_key < first_of[i % 2] || row_key >= end_of[i % 2];
      if (hidden) scores[n][i] = value;
    }
  }
}

// Stores rows of a float32 partial result, kHeadDim wide; `target` is its row 0.
template <int kHeadDim>
__device__ inline void store_partial(float* target, std::int64_t row_stride, int num_rows,
                                     const float (&values)[1][kHeadDim / 8][4], float factor) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = half * 8 + lane / 4;
    if (row >= num_rows) continue;
    float* row_data = target + row * row_stride + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<float2*>(row_data + 8 * n) =
          make_float2(factor * values[0][n][2 * half], factor * values[0][n][2 * half + 1]);
    }
  }
}

// Writes 16 rows of dk and dv of a warp, or the partial ones of its split: rows `warp_row` ... of the block of kRows
// keys, and of the tiles, which are free. `scale` is that of dk.
template <typename T, int kHeadDim, int kRows>
__device__ inline void store_key_gradients(const AttentionBackwardParams& params, const BackwardPlan& plan,
                                           const float (&dk)[1][kHeadDim / 8][4], const float (&dv)[1][kHeadDim / 8][4],
                                           float scale, std::uint32_t k_tile, std::uint32_t v_tile, int warp_row) {
  const AttentionParams& forward = params.forward;
  const auto block = KeyBlock<kRows>::read(forward, plan);
  const int row = block.key + warp_row;
  constexpr float dv_factor = 1.0f / kWeightScale<T>;
  const float dk_factor = forward.softmax_scale / scale * dv_factor;
  if (plan.num_head_splits == 1) {
    const auto target = [&](void* data, const SeqStrides& stride) {
      return rows_of<T>(data, stride, block.batch, block.kv_head, forward.seqlen_k, forward.head_dim,
                        plan.is_aligned16);
    };
    const float dk_factors[1][2] = {{dk_factor, dk_factor}}, dv_factors[1][2] = {{dv_factor, dv_factor}};
    store_rows<T, kHeadDim, kRows, 1>(target(params.dk, params.dk_stride), row, dk, dk_factors, k_tile, warp_row);
    store_rows<T, kHeadDim, kRows, 1>(target(params.dv, params.dv_stride), row, dv, dv_factors, v_tile, warp_row);
  } else {
    const std::int64_t row_stride = static_cast<std::int64_t>(forward.num_kv_heads) * kHeadDim;
    const std::int64_t size = row_stride * forward.batch * forward.seqlen_k;  // of dk or dv
    float* rows = plan.partials + 2 * block.head_split * size +
                  (static_cast<std::int64_t>(block.batch) * forward.seqlen_k + row) * row_stride +
                  block.kv_head * kHeadDim;
    store_partial<kHeadDim>(rows, row_stride, forward.seqlen_k - row, dk, dk_factor);
    store_partial<kHeadDim>(rows + size, row_stride, forward.seqlen_k - row, dv, dv_factor);
  }
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocksPerSm<kHeadDim>)
    attention_backward_dkdv_kernel(const __grid_constant__ AttentionBackwardParams params,
                                   const __grid_constant__ BackwardPlan plan) {
  constexpr int kTile = kBackwardTile;
  constexpr int kColumnTiles = kTile / 8;  // of an accumulator
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  __shared__ __align__(kVec16Bytes) QueryTile tile;
  const std::uint32_t k_tile = shared_address(shared);
  const std::uint32_t v_tile = k_tile + kTileBytes<kTile, kHeadDim>;
  const std::uint32_t q_tile = v_tile + kTileBytes<kTile, kHeadDim>;
  const std::uint32_t dout_tile = q_tile + kTileBytes<kTile, kHeadDim>;

  const AttentionParams& forward = params.forward;
  const auto block = KeyBlock<kTile>::read(forward, plan);
  const int batch = block.batch, key = block.key;
  const auto of_keys = [&](const void* data, const SeqStrides& stride) {
    return rows_of<const T>(data, stride, batch, block.kv_head, forward.seqlen_k, forward.head_dim, plan.is_aligned16);
  };
  load_tile<kTile, kHeadDim, kBackwardThreads>(k_tile, of_keys(forward.k, forward.k_stride), key);
  load_tile<kTile, kHeadDim, kBackwardThreads>(v_tile, of_keys(forward.v, forward.v_stride), key);

  const int qhead_per_kvhead = forward.num_heads / forward.num_kv_heads,
            heads_end = (block.kv_head + 1) * qhead_per_kvhead;
  QueryTileIterator iterator{block.kv_head * qhead_per_kvhead + block.head_split - plan.num_head_splits,
                             plan.num_query_tiles, 0, 0};  // before the first tile
  const auto load_queries = [&] {
    load_tile<kTile, kHeadDim, kBackwardThreads>(
        q_tile,
        rows_of<const T>(forward.q, forward.q_stride, batch, iterator.head, forward.seqlen_q, forward.head_dim,
                         plan.is_aligned16),
        iterator.tile * kTile);
    constexpr int kVecs = sizeof(QueryTile) / kVec16Bytes;
    static_assert(sizeof(QueryTile) % kVec16Bytes == 0 && kVecs <= kBackwardThreads);
    const int thread = read_thread_index();
    if (thread < kVecs) {
      const QueryTile* source = plan.tiles + tile_index(forward, plan, batch, iterator.head, iterator.tile);
      cp_async(shared_address(&tile) + thread * kVec16Bytes, reinterpret_cast<const uint4*>(source) + thread,
               kVec16Bytes);
    }
  };

  float dk[1][kHeadDim / 8][4] = {}, dv[1][kHeadDim / 8][4] = {}, scale = kFirstGradientScale<T>;
  iterator.advance(forward, plan, batch, heads_end, key);
  if (iterator.head < heads_end) load_queries();
  cp_async_commit();
#pragma unroll 1
  while (iterator.head < heads_end) {
    cp_async_wait<0>();
    __syncthreads();  // q and `tile` (at first also k and v) have arrived; all have finished with the previous dout
    load_tile<kTile, kHeadDim, kBackwardThreads>(
        dout_tile,
        rows_of<const T>(params.dout, params.dout_stride, batch, iterator.head, forward.seqlen_q, forward.head_dim,
                         plan.is_aligned16),
        iterator.tile * kTile);
    cp_async_commit();
    const float slope_log2 =
        forward.alibi_slopes == nullptr ? 0.0f : __ldg(forward.alibi_slopes + iterator.head) * kLog2E;
    const int position = iterator.tile * kTile + (forward.seqlen_k - forward.seqlen_q);
    const int thread = read_thread_index();
    const int lane = thread % kWarpLanes, warp_row = thread / kWarpLanes * 16;
    const int lane_key = key + warp_row + lane / 4;
    float weights[1][kColumnTiles][4] = {};
    multiply_transposed<T, kHeadDim, kTile, kTile, 1>(weights, k_tile, warp_row, q_tile);
    scores_to_log2_weights(weights[0], tile, plan.softmax_scale_log2, slope_log2, lane_key - position,
                           forward.causal || key + kTile - 1 <= position);
    const bool unmasked = uniform(iterator.is_unmasked()) != 0;  // needed until the end of the loop
    if (!unmasked) apply_key_mask(weights[0], tile, lane_key, -kInfinity);
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[0][n][i] = exp2_approx(weights[0][n][i]);
    }
    float ds[1][kColumnTiles][4];
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
      const float2 minus_delta = *reinterpret_cast<const float2*>(tile.minus_delta + 8 * n + lane % 4 * 2);
      ds[0][n][0] = ds[0][n][2] = minus_delta.x;
      ds[0][n][1] = ds[0][n][3] = minus_delta.y;
    }
    cp_async_wait<0>();
    __syncthreads();  // dout has arrived
    multiply_transposed<T, kHeadDim, kTile, kTile, 1>(ds, v_tile, warp_row, dout_tile);
    if (!unmasked) {
      apply_key_mask(ds[0], tile, lane_key, 0.0f);
      // The product would clamp a gradient that is not finite, so a NaN is put into the weights.
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[0][n][i] = fmaf(ds[0][n][i], 0.0f, weights[0][n][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[0][n][i] *= weights[0][n][i];
    }
    std::uint32_t weight_operands[kTile / 16][1][4];
#pragma unroll
    for (int step = 0; step < kTile / 16; ++step) pack_operand<T>(weight_operands[step][0], weights[0], step);
    scale_gradients<T>(ds, dk, scale);
    const auto add_to_dk = [&](auto clamped) {
#pragma unroll
      for (int step = 0; step < kTile / 16; ++step) {
        std::uint32_t operand[1][4];
        pack_operand<T>(operand[0], ds[0], step);
        multiply_step<T, kHeadDim, kTile, 1, decltype(clamped)::value>(dk, operand, q_tile, step);
      }
    };
    if (unmasked) {
      add_to_dk(std::false_type{});
    } else {
      add_to_dk(std::true_type{});
    }
    iterator.advance(forward, plan, batch, heads_end, key);
    __syncthreads();  // everyone has finished with q and `tile`
    if (iterator.head < heads_end) load_queries();
    cp_async_commit();
    const auto add_to_dv = [&](auto clamped) {
#pragma unroll
      for (int step = 0; step < kTile / 16; ++step) {
        multiply_step<T, kHeadDim, kTile, 1, decltype(clamped)::value>(dv, weight_operands[step], dout_tile, step);
      }
    };
    if (unmasked) {
      add_to_dv(std::false_type{});
    } else {
      add_to_dv(std::true_type{});
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // if there was no query tile, nobody has waited for k and v, whose place the results take
  store_key_gradients<T, kHeadDim, kTile>(params, plan, dk, dv, scale, k_tile, v_tile,
                                          static_cast<int>(threadIdx.x) / kWarpLanes * 16);
}

inline constexpr int kSumThreads = 256;

// One thread adds 16 bytes of channels of dk or dv, the splits in ascending order, and rounds once. There are few keys
// (otherwise there would be one split), so an int counts their vectors.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kSumThreads)
    attention_backward_sum_kernel(const __grid_constant__ AttentionBackwardParams params,
                                  const __grid_constant__ BackwardPlan plan) {
  constexpr int kVecs = kHeadDim / kVec16Width<T>;  // of a row
  const AttentionParams& forward = params.forward;
  const int num_vecs = forward.batch * forward.seqlen_k * forward.num_kv_heads * kVecs;  // of dk or dv
  const int index = blockIdx.x * kSumThreads + threadIdx.x;
  const int channel = index % kVecs * kVec16Width<T>;
  const int channels = forward.head_dim - channel;
  if (index >= 2 * num_vecs || channels <= 0) return;
  float sums[kVec16Width<T>] = {};
#pragma unroll 2
  for (int head_split = 0; head_split < plan.num_head_splits; ++head_split) {
    const float4* source = reinterpret_cast<const float4*>(plan.partials) +
                           (static_cast<std::int64_t>(2 * head_split) * num_vecs + index) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = __ldcs(source + i);
      sums[4 * i] += four.x;
      sums[4 * i + 1] += four.y;
      sums[4 * i + 2] += four.z;
      sums[4 * i + 3] += four.w;
    }
  }
  const bool is_dk = index < num_vecs;
  const int row = (is_dk ? index : index - num_vecs) / kVecs;
  const int kv_head = row % forward.num_kv_heads;
  const int key = row / forward.num_kv_heads % forward.seqlen_k;
  const int batch = row / forward.num_kv_heads / forward.seqlen_k;
  Vec16<T> rounded;
#pragma unroll
  for (int i = 0; i < Vec16<T>::kPairs; ++i) {
    rounded.pairs[i] = from_floats<T>(make_float2(sums[2 * i], sums[2 * i + 1]));
  }
  const SeqStrides& stride = is_dk ? params.dk_stride : params.dv_stride;
  T* target = static_cast<T*>(is_dk ? params.dk : params.dv) + batch * stride.batch + key * stride.seq +
              kv_head * stride.head + channel;
  if (plan.is_aligned16) {
    store<Access::kVec16>(target, rounded, channels);
  } else {
    store_elements<kVec16Width<T>>(target, rounded, channels);
  }
}

}  // namespace andromeda::cuda
