// attention (docs/model.md#5) for many query rows, on mma.sync (sm_80 and later).
//
//   out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v
//
// A block owns 128 query rows of one head, a warp 32 of them as two tiles of 16. Keys come in tiles of 64, from the
// last visible one to the first (docs/attention.md#mask):
//
//                    keys, 64 per tile                   registers of a lane          head_dim   64      128
//                 <- processed leftwards                 output, float32                         64      128
//               +-------+-------+-------+                scores, then weights, float32           64       64
//     warp 0    |  all  |  all  | mask  |                sums of rounded weights, row_max        12       12
//     warp 1    |  all  |  all  | mask  |
//     warp 2    |  all  |  all  |  all  | mask           shared memory
//     warp 3    |  all  |  all  |  all  | mask           Q 128 rows, K 64, V 64                32 KiB   64 KiB
//               +-------+-------+-------+                visible keys of each row, sums       3.6 KiB  3.6 KiB
//
// With two row tiles, a fragment of K or V that is read from shared memory serves two products. K and V have one buffer
// each: V arrives during Q K^T, the next K during P V, and the other blocks of a multiprocessor compute while this one
// waits. A block does not load tiles that none of its rows sees, or that the bias makes negligible (Head::window). A
// warp does not compute tiles that none of its own 32 rows sees.
//
// Softmax: online, or bounded where the head's logits have a small bound (softmax.cuh); the branch is the same for all
// threads of a block. The output is divided by the sum of the weights as they were rounded for the second product, so
// that the rounding of a dominant weight cancels; this sum is one more tile of columns of the product. softmax_lse uses
// the sum of the unrounded weights.
//
// Cost: 4 * head_dim flops per visible pair. Q and out move once; K and V move once per query tile, from L2 where the
// heads that share them run together. A tile without a mask costs a warp about 900 instructions with head_dim 128: 264
// products, 80 ldmatrix, 16 copies, 64 exponentials; per score one operation for the bias, one for the exponent, one
// for the sum, half an operation to pack, and one for the maximum where the softmax is online.
//
// Not supported: float32 operands, head_dim above 128, dropout.
#pragma once

#include "attention/alibi.cuh"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kForwardWarps = 4;
inline constexpr int kForwardThreads = kForwardWarps * kWarpLanes;
inline constexpr int kForwardRowTiles = 2;                                // of 16 rows, per warp
inline constexpr int kForwardWarpRows = kForwardRowTiles * 16;            // one lane describes each
inline constexpr int kForwardQueries = kForwardWarps * kForwardWarpRows;  // per block
inline constexpr int kForwardKeys = 64;                                   // per tile
static_assert(kForwardWarpRows == kWarpLanes);

template <int kHeadDim>
inline constexpr int kForwardSharedBytes =
    kTileBytes<kForwardQueries, kHeadDim> + 2 * kTileBytes<kForwardKeys, kHeadDim>;

// Per multiprocessor: as many as registers permit without spills.
template <int kHeadDim>
inline constexpr int kForwardMinBlocks = kHeadDim == 64 ? 3 : 2;

struct ForwardPlan {
  float softmax_scale_log2;  // softmax_scale * log2(e)
  int query_tiles;           // per head
  bool is_aligned16;         // q, k, v and out
};

using ForwardScores = Accumulator<kForwardRowTiles, kForwardKeys / 8>;
using ForwardWeights = std::uint32_t[kForwardKeys / 16][kForwardRowTiles][4];  // a step of 16 keys is one operand
using ForwardSums = RowValues<kForwardRowTiles>;
using ForwardSoftmax = OnlineSoftmax<kForwardRowTiles, MaxUnit::kScore>;

// The part of the problem that a block owns. The query tile is the slow index, the last one first: under a causal mask
// it sees most keys, and the blocks at the end of the launch are short. All heads, which share keys, run side by side,
// the last ones first: in this model family heads without a bias are last and have most to do.
struct ForwardBlock {
  int batch, head, kv_head, query;

  __device__ static ForwardBlock of_index(const AttentionParams& params, const ForwardPlan& plan) {
    unsigned index = blockIdx.x;
    const int head = params.num_heads - 1 - static_cast<int>(index % params.num_heads);
    index /= params.num_heads;
    const int batch = static_cast<int>(index % params.batch);
    const int tile = plan.query_tiles - 1 - static_cast<int>(index / params.batch);
    return {uniform(batch), uniform(head), uniform(head / (params.num_heads / params.num_kv_heads)),
            uniform(tile * kForwardQueries)};
  }
};

// The lane's place: its warp's first row of the tile, and its own first row and column of a result (mma.cuh).
struct ForwardPlace {
  int warp_row, row, column;

  __device__ static ForwardPlace read() {
    const int thread = read_thread_index(), lane = thread % kWarpLanes;
    return {thread / kWarpLanes * kForwardWarpRows, lane >> 2, 2 * (lane & 3)};
  }
};

// The decisions of a block's warps before the loop, and the sums of the unrounded weights. The loop has no registers
// left for them.
struct ForwardShared {
  Row rows[kForwardQueries];
  KeyRange key_range[kForwardWarps];  // of a warp's rows
  int all_see_themselves[kForwardWarps];
  int first_tile, is_bounded;                     // to be read after the first barrier of the loop
  alignas(16) ForwardSums sums[kForwardThreads];  // those of a lane's columns, which it alone uses

  __device__ ForwardSums& own_sum() { return sums[read_thread_index()]; }
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kForwardThreads, kForwardMinBlocks<kHeadDim>)
    attention_forward_kernel(const AttentionParams params, const ForwardPlan plan) {
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  __shared__ ForwardShared common;
  const std::uint32_t q_tile = shared_address(shared);
  const std::uint32_t k_tile = q_tile + kTileBytes<kForwardQueries, kHeadDim>;
  const std::uint32_t v_tile = k_tile + kTileBytes<kForwardKeys, kHeadDim>;

  const ForwardBlock block = ForwardBlock::of_index(params, plan);
  const auto rows_of = [&](auto* data, const SeqStrides& stride, int head, int count) {
    return Rows<std::remove_reference_t<decltype(*data)>>{data + block.batch * stride.batch + head * stride.head,
                                                          stride.seq, count, params.head_dim, plan.is_aligned16};
  };
  const auto q = rows_of(static_cast<const T*>(params.q), params.q_stride, block.head, params.seqlen_q);
  const auto k = rows_of(static_cast<const T*>(params.k), params.k_stride, block.kv_head, params.seqlen_k);
  const auto v = rows_of(static_cast<const T*>(params.v), params.v_stride, block.kv_head, params.seqlen_k);

  // Find the keys that the rows see, one row per lane, then the block's range of tiles and its kind of softmax.
  const Head head = describe_head(params, block.head);
  const int own_query = block.query + static_cast<int>(threadIdx.x);
  const Row own_row = describe_row(params, block.batch, own_query);
  const bool exists = own_query < params.seqlen_q;
  const KeyRange key_range = KeyRange::of(own_row, exists, head.window).of_warp();
  const bool sees_itself = __all_sync(kWholeWarp, !exists || own_row.empty() || own_row.sees_itself());
  common.rows[threadIdx.x] = own_row;
  if (const int warp = threadIdx.x / kWarpLanes; threadIdx.x % kWarpLanes == 0) {
    common.key_range[warp] = key_range;
    common.all_see_themselves[warp] = sees_itself;
  }
  __syncthreads();  // all warps have written theirs
  int begin = kUnlimited, end = 0;
  bool is_bounded = true;  // a biased row that does not see its own key may have only tiny weights
#pragma unroll
  for (int i = 0; i < kForwardWarps; ++i) {
    begin = min(begin, common.key_range[i].begin);
    end = max(end, common.key_range[i].end);
    is_bounded = is_bounded && common.all_see_themselves[i] != 0;
  }
  is_bounded = head.bound <= kMaxBound<T> && (is_bounded || head.slope == 0.0f);
  const int first_tile = begin / kForwardKeys * kForwardKeys;
  const int last_tile = uniform((end - 1) / kForwardKeys * kForwardKeys);
  if (threadIdx.x == 0) {
    common.first_tile = first_tile;
    common.is_bounded = is_bounded;
  }

  // The bias and the maxima are in units of <q, k>. With a bound, row_max only undoes the shift of seed_bias in rows g,
  // so that a weight is that of the true logit.
  const float raw_slope = head.slope / params.softmax_scale;
  ForwardSoftmax softmax{plan.softmax_scale_log2};
  ForwardSums& sum_so_far = common.own_sum();
  Accumulator<kForwardRowTiles, 1> rounded_sum = {};
  float out[kForwardRowTiles][kHeadDim / 8][4] = {};
#pragma unroll
  for (int row_tile = 0; row_tile < kForwardRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax.row_max[row_tile][half] = is_bounded ? -lowered_by(half) * raw_slope : -kInfinity;
      sum_so_far[row_tile][half] = 0.0f;
    }
  }

  if (first_tile <= last_tile) {
    load_tile<kForwardQueries, kHeadDim, kForwardThreads>(q_tile, q, block.query);
    load_tile<kForwardKeys, kHeadDim, kForwardThreads>(k_tile, k, last_tile);
    cp_async_commit();
    int key = last_tile;
#pragma unroll 1
    do {
      const bool touched = key_range.touches(key, kForwardKeys);  // the same in all lanes
      ForwardWeights weights;

      cp_async_wait<0>();
      __syncthreads();  // K (and Q) have arrived for all; all have read the previous V
      load_tile<kForwardKeys, kHeadDim, kForwardThreads>(v_tile, v, key);
      cp_async_commit();
      if (touched) {
        const ForwardPlace place = ForwardPlace::read();
        const int warp_position = block.query + place.warp_row + (params.seqlen_k - params.seqlen_q);
        const int position = warp_position + place.row, lane_key = key + place.column;
        ForwardScores scores;
        seed_bias(scores, raw_slope, position, lane_key);
        multiply_transposed<T, kHeadDim, kForwardQueries, kForwardKeys>(scores, q_tile, place.warp_row, k_tile);
        // A causal mask hides the keys right of the diagonal, and without a bias there is nothing to mirror.
        const bool left_of_diagonal = params.causal || raw_slope == 0.0f || key + kForwardKeys <= warp_position + 1;
        if (!left_of_diagonal) {
          const ForwardPlace again =
              ForwardPlace::read();  // else `position` would stay in a register during the product
          const int offset = block.query + (params.seqlen_k - params.seqlen_q);
          mirror_bias(scores, raw_slope, offset + again.warp_row + again.row, key + again.column);
        }
        const KeyRange& stored_key_range = common.key_range[place.warp_row / kForwardWarpRows];
        if (!stored_key_range.is_unmasked(key, kForwardKeys))
          apply_mask(scores, common.rows + place.warp_row, lane_key);
        if (!common.is_bounded && softmax.update(scores)) {
          softmax.rescale(out);
          softmax.rescale(rounded_sum);
          softmax.rescale(common.own_sum());
        }
        // The sum of a tile is computed separately: a long row would lose the last bits of small addends.
        ForwardSums tile_sum = {};
        softmax.exponentiate(scores, tile_sum);
        add_to(common.own_sum(), tile_sum);
#pragma unroll
        for (int step = 0; step < kForwardKeys / 16; ++step) {
#pragma unroll
          for (int row_tile = 0; row_tile < kForwardRowTiles; ++row_tile) {
            pack_operand<T>(weights[step][row_tile], scores[row_tile], step);
          }
        }
      }

      cp_async_wait<0>();
      __syncthreads();  // V has arrived for all; all have read K
      if (key > common.first_tile) {
        load_tile<kForwardKeys, kHeadDim, kForwardThreads>(k_tile, k, key - kForwardKeys);
        cp_async_commit();
      }
      if (touched) {
        const int warp_row = ForwardPlace::read().warp_row;
        const bool unmasked = common.key_range[warp_row / kForwardWarpRows].is_unmasked(key, kForwardKeys);
        // A warp that must not see all of a tile takes the slow path if the tile is not finite.
        const auto add_values = [&](auto clamped) {
#pragma unroll
          for (int step = 0; step < kForwardKeys / 16; ++step) {
#pragma unroll
            for (int row_tile = 0; row_tile < kForwardRowTiles; ++row_tile) {
              mma<T>(rounded_sum[row_tile][0], weights[step][row_tile], kPairOfOnes<T>, kPairOfOnes<T>);
            }
            multiply_step<T, kHeadDim, kForwardKeys, kForwardRowTiles, decltype(clamped)::value>(out, weights[step],
                                                                                                 v_tile, step);
          }
        };
        if (unmasked || is_finite<T, kTileBytes<kForwardKeys, kHeadDim>>(v_tile)) {
          add_values(std::false_type{});
        } else {
          add_values(std::true_type{});
          add_not_finite<T, kHeadDim, kForwardKeys>(out, common.rows + warp_row, key, v_tile);
        }
      }
      key -= kForwardKeys;
    } while (key >= common.first_tile);
  }

  const ForwardPlace place = ForwardPlace::read();
  const int first_query = block.query + place.warp_row;
  ForwardSums& sum = common.own_sum();
  ForwardSums factor;
#pragma unroll
  for (int row_tile = 0; row_tile < kForwardRowTiles; ++row_tile) {
    sum_over_group(sum[row_tile], 2);  // the four lanes of a row have different columns
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float divisor = rounded_sum[row_tile][0][2 * half];  // all its columns are equal
      factor[row_tile][half] = divisor == 0.0f ? 0.0f : 1.0f / divisor;
      const int query = first_query + row_tile * 16 + half * 8 + place.row;
      if (place.column == 0 && query < params.seqlen_q) {
        const float log2_sum =
            softmax.exponent(row_tile, half) + log2f(sum[row_tile][half]);  // -inf without a visible key
        const std::int64_t row = static_cast<std::int64_t>(block.batch) * params.num_heads + block.head;
        params.softmax_lse[row * params.seqlen_q + query] = fmaf(kLn2, log2_sum, lowered_by(half) * head.slope);
      }
    }
  }
  const auto target = rows_of(static_cast<T*>(params.out), params.out_stride, block.head, params.seqlen_q);
  store_rows<T, kHeadDim, kForwardQueries, kForwardRowTiles>(target, first_query, out, factor, q_tile, place.warp_row);
}

}  // namespace andromeda::cuda
