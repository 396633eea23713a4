// attention (docs/model.md#5) for few query rows and many keys: decoding, short continuations.
//
//   out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v
//
// All tokens and all query heads of a key head are packed into the rows of one tile (pack_gqa: row = token *
// qhead_per_kvhead + head), so that a key is read once for all of them. A block owns 16 or 32 rows of one (batch, key
// head), and one of num_splits parts of the keys. Its warps take slices of 16 keys in turn; each warp has a maximum, a
// sum and an output of its own:
//
//              steps of 64 keys, num_splits runs of them
//             +----+----+----+----+----+----+----+----+--
//   16 or 32  |w0  | w1 | w2 | w3 |w0  | w1 | w2 | w3 |       S = q k^T    rows x 16
//     rows    |    |    |    |    |    |    |    |    |       out += P v   rows x head_dim, registers
//             +----+----+----+----+----+----+----+----+--
//
// The keys and values of slices pass through a ring of stages of the warp's own: the loop has no barrier of the block.
// As soon as the keys of a slice have been multiplied, those of the slice kStages later take their place.
//
//   shared memory, head_dim 128     queries 8 KiB, ring 4 warps x 2 stages x (4 KiB keys + 4 KiB values) = 64 KiB
//   head_dim 64                     queries 4 KiB, ring 4 warps x 4 stages x (2 KiB keys + 2 KiB values) = 64 KiB
//   registers, 32 rows, 128 wide    out 128, scores 16, their maxima, sums, slopes and positions 4 each
//
// 32 flops for each byte that is read are a fifth of what the tensor cores could do in the same time. What counts is
// the number of bytes in flight, latency times bandwidth: 24 KiB per multiprocessor (docs/attention.md#decoding). A
// block has 48 to 64 KiB in flight. Two blocks fit on a multiprocessor of 8.0 and 9.0, one where shared memory ends at
// 100 KiB.
//
// At the end the four warps add their outputs through shared memory, and the blocks of the splits theirs through the
// workspace, in the order of the splits: a result does not depend on timing (combine.cuh). On Hopper the blocks of a
// cluster come first (hopper/attention_decode.cuh).
//
// A block starts with four loads that depend on nothing, then the copies of the queries, and waits once, for the loads:
// then the ring is filled. It waits for the queries when they are needed.
//
// Every call uses online softmax: memory hides its cost. The largest weight of a row is then exactly 1, and
// the sum of the unrounded weights is a good enough divisor (docs/attention.md#bounded-softmax).
//
// With num_keys, the number of keys is read on the device. The grid, the workspace and the tree of sums are those of all
// seqlen_k rows, and the splits share the keys that exist. Rows beyond are never visible. Where a slice with the last
// key holds some, they are masked like any hidden key, so that their contents do not matter.
//
// Not supported: float32, head_dim above 128 (launch.h).
#pragma once

#include <cstdint>

#include "attention/combine.cuh"
#include "attention/decode_plan.cuh"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

__device__ inline std::int64_t offset_of(const SeqStrides& stride, int batch, int seq, int head) {
  return batch * stride.batch + seq * stride.seq + head * stride.head;
}

// A row of the packed tile as a query of one head.
struct QueryRow {
  int query, head;
  bool exists;
};

__device__ inline QueryRow unpack_row(const DecodePlan& plan, int kv_head, int packed) {
  const auto [query, head] = divide(packed, plan.qhead_per_kvhead);
  return {query, kv_head * plan.qhead_per_kvhead.value + head, packed < plan.num_rows};
}

// Begins to copy the query rows of the block. Rows and channels that do not exist become zero.
template <int kHeadDim, int kRows, typename T>
__device__ inline void load_queries(std::uint32_t tile, const AttentionParams& params, const DecodePlan& plan,
                                    int batch, int kv_head, int first_row, int thread) {
  constexpr int kVecs = kHeadDim / kVec16Width<T>;
  static_assert(kRows * kVecs % kDecodeThreads == 0);
  const T* q = static_cast<const T*>(params.q);
#pragma unroll 1
  for (int i = thread; i < kRows * kVecs; i += kDecodeThreads) {
    const int row = i / kVecs, vec = i % kVecs;
    const QueryRow unpacked = unpack_row(plan, kv_head, first_row + row);
    const int channels = unpacked.exists ? params.head_dim - vec * kVec16Width<T> : 0;
    const T* source = q;
    if (channels > 0) {
      source += offset_of(params.q_stride, batch, unpacked.query, unpacked.head) + vec * kVec16Width<T>;
    }
    const std::uint32_t target = tile + vec_offset<kRows>(row, vec);
    if (plan.is_aligned16) {
      cp_async(target, source, channels > 0 ? kVec16Bytes : 0);
    } else {
      copy_elements(target, source, channels);
    }
  }
}

__device__ inline int count_keys(const AttentionParams& params) {
  return params.num_keys == nullptr ? params.seqlen_k : min(max(__ldg(params.num_keys), 0), params.seqlen_k);
}

// What a lane must know of its row: lane `l` has row `l` of the block. All of it is loaded before any is used, and the
// queries are copied in the meantime: the first copies of keys wait for one trip to memory, not for several.
struct RowInputs {
  QueryRow row;  // a lane without a row has one that does not exist
  float slope, bound;
  int num_keys, key_start;
};

template <int kRows>
__device__ inline RowInputs load_row_inputs(const AttentionParams& params, const DecodePlan& plan, int batch,
                                            int kv_head, int first_row) {
  const int lane = static_cast<int>(threadIdx.x);
  RowInputs inputs{unpack_row(plan, kv_head, first_row + lane), 0.0f, kInfinity, count_keys(params), 0};
  if (lane >= kRows || !inputs.row.exists) inputs.row = {params.seqlen_q, -1, false};
  if (!inputs.row.exists) return inputs;
  if (params.alibi_slopes != nullptr) inputs.slope = __ldg(params.alibi_slopes + inputs.row.head);
  if (params.logit_bound != nullptr) inputs.bound = __ldg(params.logit_bound + inputs.row.head);
  inputs.key_start = load_key_start(params, batch, inputs.row.query);
  return inputs;
}

// Describes the block's rows, and returns the keys that they see. One warp writes them to `shared`.
template <int kRows>
__device__ inline KeyRange describe_rows(DecodeShared<kRows>* shared, const AttentionParams& params,
                                         const DecodePlan& plan, const RowInputs& inputs, bool write) {
  const int lane = static_cast<int>(threadIdx.x);
  const Row row = describe_row(params, inputs.row.query, inputs.num_keys, inputs.key_start);
  if (write && lane == 0) shared->first_position = inputs.num_keys - params.seqlen_q;
  if (write && lane < kRows) {
    shared->rows[lane] = row;
    shared->head[lane] = inputs.row.head;
    shared->raw_slope[lane] = inputs.slope * plan.inverse_softmax_scale;
  }
  return KeyRange::of(row, inputs.row.exists, describe_head(inputs.slope, inputs.bound).window).of_warp();
}

inline constexpr int kScoreTiles = kSlice / 8;

// A lane's two rows of each row tile: [row_tile][half] is row 16 * row_tile + 8 * half + lane / 4.
template <int kRowTiles>
struct LaneRows {
  float raw_slope[kRowTiles][2];
  int position[kRowTiles][2];
};

// Sets the accumulators to the bias. Rows differ in their slopes, so every score needs its own pair of instructions,
// and the form with |.| serves keys on either side. `key` is that of the lane's first column.
template <int kRowTiles>
__device__ inline void seed_row_bias(float (&scores)[kRowTiles][kScoreTiles][4], const LaneRows<kRowTiles>& rows,
                                     int key) {
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float distance = static_cast<float>(key - rows.position[row_tile][half]);  // exact: computed in integers
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scores[row_tile][n][2 * half + i] =
              -rows.raw_slope[row_tile][half] * fabsf(distance + static_cast<float>(8 * n + i));
        }
      }
    }
  }
}

// Divides, rounds and writes four channels of a row of the block.
template <typename T, int kRows>
__device__ inline void write_vector(const AttentionParams& params, const DecodePlan& plan, int batch,
                                    const DecodeShared<kRows>* shared, int row, int channel, const float4& total,
                                    float sum) {
  const int head = shared->head[row], query = shared->rows[row].position - shared->first_position;
  const int channels = params.head_dim - channel;
  if (head < 0 || channels <= 0) return;
  const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: a row that sees no key; a NaN stays one
  const uint2 bits =
      make_uint2(pack<T>(total.x * factor, total.y * factor), pack<T>(total.z * factor, total.w * factor));
  T* target = static_cast<T*>(params.out) + offset_of(params.out_stride, batch, query, head) + channel;
  if (plan.is_aligned16) {
    *reinterpret_cast<uint2*>(target) = bits;
  } else {
    store_elements<4>(target, bits, channels);
  }
}

// Writes the log-sum-exp of a row of the block.
template <int kRows>
__device__ inline void write_lse(const AttentionParams& params, int batch, const DecodeShared<kRows>* shared, int row,
                                 const Statistics& total) {
  if (shared->head[row] < 0) return;
  const std::int64_t head = static_cast<std::int64_t>(batch) * params.num_heads + shared->head[row];
  const int query = shared->rows[row].position - shared->first_position;
  params.softmax_lse[head * params.seqlen_q + query] = fmaf(total.maximum, kLn2, logf(total.sum));
}

// The part of a call that a block has: a row block, and one of the splits of its keys.
struct DecodeBlock {
  int batch, kv_head, row_block, split;
};

// The blocks of a cluster, one block where there are none, have neighbouring splits. Clusters of row blocks that read
// the same keys are neighbours in the grid: the second one finds them in L2.
__device__ inline DecodeBlock find_decode_block(const DecodePlan& plan) {
  const int cluster = static_cast<int>(blockIdx.x) >> plan.cluster_size_log2;
  const int rank = static_cast<int>(blockIdx.x) - (cluster << plan.cluster_size_log2);
  const auto [cluster_of_head, row_block] = divide(cluster, plan.num_row_blocks);
  const auto [head_of_batch, cluster_of_rows] = divide(cluster_of_head, plan.num_clusters);
  const auto [batch, kv_head] = divide(head_of_batch, plan.num_kv_heads);
  return {batch, kv_head, row_block, (cluster_of_rows << plan.cluster_size_log2) + rank};
}

// The number of the block's row block among those of the whole call.
__device__ inline std::int64_t row_block_of_call(const DecodePlan& plan, const DecodeBlock& block) {
  return (static_cast<std::int64_t>(block.batch) * plan.num_kv_heads.value + block.kv_head) *
             plan.num_row_blocks.value +
         block.row_block;
}

// The attention of the block's rows to the keys of its split. On return `shared` describes the rows, and for add_warps()
// the outputs of the warps lie in place of the tiles, with their factors and the statistics of their sum in `shared`.
//
// Blocks are dim3(32, kDecodeWarps), so that threadIdx.x is the lane: load_tile then works for one warp.
template <typename T, int kHeadDim, int kRowTiles>
__device__ inline void attend_to_split(unsigned char* shared_memory, const AttentionParams& params,
                                       const DecodePlan& plan, const DecodeBlock& block) {
  using Tiles = DecodeTiles<kHeadDim, kRowTiles>;
  constexpr int kRows = Tiles::kRows, kStages = Tiles::kStages;
  auto* shared = Tiles::shared_of(shared_memory);
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int thread = warp * kWarpLanes + lane;
  const std::uint32_t q_tile = shared_address(shared_memory);
  const std::uint32_t ring = q_tile + Tiles::kQueryBytes + warp * Tiles::kRingBytes;
  const int batch = block.batch, kv_head = block.kv_head, split = block.split, first_row = block.row_block * kRows;

  // Load the rows, and find the keys that they see.
  const RowInputs inputs = load_row_inputs<kRows>(params, plan, batch, kv_head, first_row);
  load_queries<kHeadDim, kRows, T>(q_tile, params, plan, batch, kv_head, first_row, thread);
  cp_async_commit();
  const KeyRange key_range = describe_rows(shared, params, plan, inputs, warp == 0);

  // Find this block's run of steps, one more in the first splits, and this warp's slices of it, which are kDecodeStep
  // keys apart.
  const int begin = key_range.begin < key_range.end ? key_range.begin / kSlice * kSlice : 0;
  const int num_keys = max(key_range.end - begin, 0);
  const auto [steps, more] = divide((num_keys + kDecodeStep - 1) / kDecodeStep, plan.num_splits);
  const int first_step = split * steps + min(split, more), end_step = first_step + steps + (split < more ? 1 : 0);
  const int first_offset = first_step * kDecodeStep + warp * kSlice;
  const int end_offset = min(end_step * kDecodeStep, num_keys);
  const int num_slices = (max(end_offset - first_offset, 0) + kDecodeStep - 1) / kDecodeStep;
  const int first_slice = begin + first_offset;

  const T* k_data = static_cast<const T*>(params.k) + offset_of(params.k_stride, batch, 0, kv_head);
  const T* v_data = static_cast<const T*>(params.v) + offset_of(params.v_stride, batch, 0, kv_head);
  const Rows<const T> k{k_data, params.k_stride.seq, params.seqlen_k, params.head_dim, plan.is_aligned16};
  const Rows<const T> v{v_data, params.v_stride.seq, params.seqlen_k, params.head_dim, plan.is_aligned16};
  // Every call commits a group, an empty one past the end, so that a slice has arrived when a fixed number of younger
  // groups is left.
  const auto load_slice = [&](const Rows<const T>& rows, int slice, std::uint32_t place) {
    if (slice < num_slices) {
      load_tile<kSlice, kHeadDim, kWarpLanes>(place, rows, first_slice + slice * kDecodeStep);
    }
    cp_async_commit();
  };
  const auto k_slice = [&](int slice) { return ring + slice % kStages * (2 * Tiles::kSliceBytes); };
  const auto v_slice = [&](int slice) { return k_slice(slice) + Tiles::kSliceBytes; };
  constexpr int kYounger = 2 * kStages - 1;
#pragma unroll 1
  for (int slice = 0; slice < kStages; ++slice) {
    load_slice(k, slice, k_slice(slice));
    load_slice(v, slice, v_slice(slice));
  }
  cp_async_wait<2 * kStages>();  // the queries have arrived
  __syncthreads();               // those of all threads, and the description of the rows

  LaneRows<kRowTiles> rows;
  OnlineSoftmax<kRowTiles, MaxUnit::kLog2> softmax{plan.softmax_scale_log2};
  RowValues<kRowTiles> sum = {};  // of the weights in this lane's columns
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_tile * 16 + half * 8 + (lane >> 2);
      rows.raw_slope[row_tile][half] = shared->raw_slope[row];
      rows.position[row_tile][half] = shared->rows[row].position;
      softmax.row_max[row_tile][half] = -kInfinity;
    }
  }
  float out[kRowTiles][kHeadDim / 8][4] = {};

  for (int slice = 0; slice < num_slices; ++slice) {
    const int key = first_slice + slice * kDecodeStep;
    const int lane_key = key + ((lane & 3) << 1);
    float scores[kRowTiles][kScoreTiles][4];
    seed_row_bias(scores, rows, lane_key);
    cp_async_wait<kYounger>();
    __syncwarp();  // the keys of all lanes have arrived
    multiply_transposed<T, kHeadDim, kRows, kSlice>(scores, q_tile, 0, k_slice(slice));
    __syncwarp();  // all lanes have read the keys
    load_slice(k, slice + kStages, k_slice(slice));

    const bool unmasked = key_range.is_unmasked(key, kSlice);
    if (!unmasked) apply_mask(scores, shared->rows, lane_key);
    if (softmax.update(scores)) {
      softmax.rescale(out);
      softmax.rescale(sum);
    }
    softmax.exponentiate(scores, sum);
    std::uint32_t weights[kRowTiles][4];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) pack_operand<T>(weights[row_tile], scores[row_tile], 0);

    cp_async_wait<kYounger>();
    __syncwarp();  // the values of all lanes have arrived
    if (unmasked || is_finite<T, Tiles::kSliceBytes>(v_slice(slice))) {
      multiply_step<T, kHeadDim, kSlice>(out, weights, v_slice(slice), 0);
    } else {
      multiply_step<T, kHeadDim, kSlice, kRowTiles, true>(out, weights, v_slice(slice), 0);
      add_not_finite<T, kHeadDim, kSlice>(out, shared->rows, key, v_slice(slice));
    }
    __syncwarp();  // all lanes have read the values
    load_slice(v, slice + kStages, v_slice(slice));
  }

  // Add the results of the warps.
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
    sum_over_group(sum[row_tile], 2);  // the four lanes of a row
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_tile * 16 + half * 8 + (lane >> 2);
      if ((lane & 3) == 0) {
        shared->statistics[warp][row] = {softmax.row_max[row_tile][half], sum[row_tile][half]};
      }
    }
  }
  __syncthreads();  // statistics are complete; all warps have finished with q and the rings, which become staging
  auto* staging = reinterpret_cast<float*>(shared_memory);
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * kRows + row_tile * 16 + half * 8 + (lane >> 2);
      auto* target = reinterpret_cast<float2*>(staging + row * Tiles::kOutPitch + ((lane & 3) << 1));
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        target[n * 4] = make_float2(out[row_tile][n][2 * half], out[row_tile][n][2 * half + 1]);
      }
    }
  }
  combine_statistics(shared, kDecodeWarps, kRows, thread);
  __syncthreads();  // outputs and factors are complete
}

template <typename T, int kHeadDim, int kRowTiles>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_decode_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ DecodePlan plan) {
  using Tiles = DecodeTiles<kHeadDim, kRowTiles>;
  constexpr int kRows = Tiles::kRows;
  extern __shared__ __align__(kTileAlignment) unsigned char shared_memory[];
  const DecodeBlock block = find_decode_block(plan);
  attend_to_split<T, kHeadDim, kRowTiles>(shared_memory, params, plan, block);

  auto* shared = Tiles::shared_of(shared_memory);
  const int thread = static_cast<int>(threadIdx.y) * kWarpLanes + static_cast<int>(threadIdx.x);
  constexpr int kVectors = kRows * kHeadDim / 4 / kDecodeThreads;
  float4 total[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    total[i] = add_warps<kHeadDim, kRowTiles>(shared_memory, OwnVector<kHeadDim>(thread, i));
  }
  const int num_rows = min(plan.num_rows - block.row_block * kRows, kRows);
  if (!combine_splits<kRows, kHeadDim>(total, shared, shared_memory, plan, row_block_of_call(plan, block), block.split,
                                       num_rows, thread)) {
    return;
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const OwnVector<kHeadDim> own(thread, i);
    write_vector<T>(params, plan, block.batch, shared, own.row, own.channel, total[i], shared->total[own.row].sum);
  }
  if (thread < kRows) write_lse(params, block.batch, shared, thread, shared->total[thread]);
}

}  // namespace andromeda::cuda
