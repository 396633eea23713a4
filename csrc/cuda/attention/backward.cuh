// attention, backward (docs/model.md#16.3): three kernels without atomics. Every sum has one owner and a fixed order.
//
//   P  = 2^(softmax_scale_log2 * (q k^T + bias) - lse)      recomputed; log-sum-exps in base 2
//   dP = dout v^T,   delta = <dout, out>,   dS = P * (dP - delta)
//   dq = softmax_scale * dS k,   dk = softmax_scale * dS^T q,   dv = P^T dout
//
// dq kernel (backward_dq.cuh): a block owns 128 queries of one head, a warp 32 of them as two tiles of 16. It walks
// over the tiles of 32 keys that they see (docs/attention.md#backward), from the last one to the first.
//
//                 keys, 32 per tile                    registers of a lane        head_dim   64     128
//             <- processed leftwards                   dq, float32                           64     128
//            +----+----+----+----+                     dP, then dS; S, then P                64      64
//     warp 0 |    |    |    |    |                     delta, log-sum-exp of four rows        8       8
//     warp 1 |    |    |    |    |  -> dq
//     warp 2 |    |    |    |    |                     shared memory
//     warp 3 |    |    |    |    |                     q, dout resident: 128 rows        32 KiB  64 KiB
//            +----+----+----+----+                     k, v: 32 rows, one or two stages  16 KiB  16 or 32 KiB
//
//   Shared memory and tensor cores limit its speed. With two row tiles a fragment of k or v serves two products: a
//   64 x 64 pair of tiles occupies shared memory for 1408 clocks (704 with 64 channels) instead of 2048 (1024), and the
//   tensor cores for 1536 (768) on 8.0 and 1152 (576) on 9.0. Tiles of 64 keys would need 1152 (576), and 64 more
//   registers than exist (one resident block fewer). With two stages, the next k and v arrive during a whole tile. One
//   stage is used where two would cost a resident block. Then the products are ordered so that each buffer is refilled
//   while the other one is in use: dP (v), then S and dq (k). The kernel writes for the next one the numbers of each
//   query row besides q and dout (`QueryTile`), and the keys that a tile of 64 queries touches (`KeyRange`).
//
// dk, dv kernel (backward_dkdv.cuh): a block owns 64 keys of one key head, a warp 16 of them. It walks over the tiles
// of 64 queries that see them, of all query heads of the key head or of a split of those heads.
//
//                 queries of head 0, of head 1 ...      shared: k, v resident; q, dout one buffer each
//            +----+----+----+----+----+----+            registers: dk, dv, P^T, dS^T
//   keys     |    |    |    |    |    |    |  -> dk, dv
//            +----+----+----+----+----+----+
//
//   Keys are the rows here, so that P^T and dS^T are A operands of the next products without an exchange.
//   Order: S (q), dP (dout), dk (q), dv (dout).
//
// sum kernel: where one key head has too few key tiles to fill the device, its query heads are split. Each split writes
// its dk and dv in float32, and this kernel adds them.
//
// head_dim   shared memory, KiB     registers (float16)            flops per 64 x 64 pair of tiles
//   64       dq 49, dk dv 33        dq 168, dk dv 168              2 * 64 * 64 *  64 * (3 + 4)
//   128      dq 81 or 97, 65        dq 254 (255), 247 (254)        2 * 64 * 64 * 128 * (3 + 4)
//
// Hopper has its own dq kernel and dk, dv kernel (hopper/attention_backward_dq.cuh, attention_backward_dkdv.cuh). They
// share the plan, the formulas, and the numbers that the first writes for the second.
//
// A single pass would need 5 products instead of 7, and either atomics or an order of the additions to dq.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kBackwardThreads = 128;
inline constexpr int kBackwardWarps = kBackwardThreads / kWarpLanes;
inline constexpr int kBackwardTile = 64;  // queries or keys of the dk, dv kernel; a warp owns 16 keys
static_assert(kBackwardTile == 16 * kBackwardWarps);

inline constexpr int kQueryRowTiles = 2;                            // of 16 rows, per warp of the dq kernel
inline constexpr int kQueryWarpRows = 16 * kQueryRowTiles;          // one lane describes each
inline constexpr int kQueryRows = kBackwardWarps * kQueryWarpRows;  // per block
inline constexpr int kQueryKeys = 32;                               // per tile
static_assert(kQueryWarpRows == kWarpLanes && kBackwardTile == 2 * kQueryWarpRows);

template <int kHeadDim, int kStages>
inline constexpr int kQuerySharedBytes =
    2 * kTileBytes<kQueryRows, kHeadDim> + kStages * 2 * kTileBytes<kQueryKeys, kHeadDim>;
template <int kHeadDim>
inline constexpr int kKeySharedBytes = 4 * kTileBytes<kBackwardTile, kHeadDim>;

// Per multiprocessor: as many as shared memory and registers (at most 255 or 168) permit on 8.0 and 9.0.
template <int kHeadDim>
inline constexpr int kBackwardBlocksPerSm = kHeadDim == 128 ? 2 : 3;

// The smallest float16 is 2^-24, but a key may have nothing but small weights and small gradients. So both are
// multiplied by powers of two before they are rounded, and the sums are divided by them. A weight is at most 1.
template <typename T>
inline constexpr float kWeightScaleLog2 = std::is_same_v<T, __half> ? 15.0f : 0.0f;
template <typename T>
inline constexpr float kWeightScale = std::is_same_v<T, __half> ? 0x1p15f : 1.0f;
template <typename T>
inline constexpr float kFirstGradientScale = std::is_same_v<T, __half> ? 0x1p24f : 1.0f;

// Multiplies dS by `scale`. Where an element of the warp reaches 2^15, lowers `scale`, dS and the sums made with them.
template <typename T, int kRowTiles, int kColumnTiles, int kSums>
__device__ inline void scale_gradients(float (&ds)[kRowTiles][kColumnTiles][4], float (&sums)[kRowTiles][kSums][4],
                                       float& scale) {
  if constexpr (std::is_same_v<T, __half>) {
    float largest = 0.0f;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds[row_tile][n][i] *= scale;
          largest = fmaxf(largest, fabsf(ds[row_tile][n][i]));
        }
      }
    }
    if (!__any_sync(kWholeWarp, largest >= 0x1p15f)) return;
    if (__any_sync(kWholeWarp, largest == kInfinity)) {
      // An infinity ruins only its own row; the other rows keep their digits.
      largest = 0.0f;
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
        for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float size = fabsf(ds[row_tile][n][i]);
            if (size < kInfinity) largest = fmaxf(largest, size);
          }
        }
      }
      if (!__any_sync(kWholeWarp, largest >= 0x1p15f)) return;
    }
    // Floats that are not negative compare as their bits do.
    const int exponent = (__reduce_max_sync(kWholeWarp, __float_as_int(largest)) >> 23) - 127;
    const float ratio = __int_as_float((127 + 14 - exponent) << 23);
    scale *= ratio;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[row_tile][n][i] *= ratio;
      }
#pragma unroll
      for (int n = 0; n < kSums; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[row_tile][n][i] *= ratio;
      }
    }
  }
}

// A tile of query rows for the dk, dv kernel, one KiB in the workspace and in shared memory. Rows that see no key or do
// not exist have an infinite lse, so that their weights are 0.
//
// `lse` is in base 2, plus slope_log2 * (row in the tile), minus kWeightScaleLog2: see `scores_to_log2_weights`.
struct QueryTile {
  float lse[kBackwardTile];
  float minus_delta[kBackwardTile];
  int first[kBackwardTile], end[kBackwardTile];  // keys that the row sees
};

struct BackwardPlan {
  KeyRange* key_ranges;  // (batch, num_heads, num_query_tiles)
  QueryTile* tiles;      // (batch, num_heads, num_query_tiles)
  // (num_head_splits, 2: dk and dv, batch, seqlen_k, num_kv_heads, built head_dim); unused with one split
  float* partials;
  int num_query_tiles;   // of a head
  int num_query_blocks;  // of a head: blocks of the dq kernel
  int num_head_splits;   // of the query heads of a key head; split s has the heads s, s + num_head_splits ...
  float softmax_scale_log2;
  bool is_aligned16;
};

// The queries of a block of a dq kernel, and their head. The longest work comes first: under a causal mask the last
// queries see most keys, and heads without a bias are usually last.
struct QueryBlock {
  int batch, head, kv_head, query;

  // blockIdx.x is read again after the loop, which then keeps nothing in registers that it does not need.
  __device__ static QueryBlock read(const AttentionParams& params, const BackwardPlan& plan) {
    unsigned block;
    asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(block));
    const int batch = block % params.batch;
    block /= params.batch;
    const int head = params.num_heads - 1 - block % params.num_heads;
    const int tile = plan.num_query_blocks - 1 - block / params.num_heads;
    return {uniform(batch), uniform(head), uniform(head / (params.num_heads / params.num_kv_heads)),
            uniform(tile * kQueryRows)};
  }
};

// Indices are unsigned where they are multiplied in 64 bits: the upper word of a signed one occupies a register.
__device__ inline std::int64_t tile_index(const AttentionParams& params, const BackwardPlan& plan, unsigned batch,
                                          unsigned head, unsigned tile) {
  return (static_cast<std::int64_t>(batch) * params.num_heads + head) * plan.num_query_tiles + tile;
}

// A head of a (batch, seqlen, num_heads, head_dim) tensor. U is T or const T.
template <typename U>
__device__ inline Rows<U> rows_of(const void* data, const SeqStrides& stride, unsigned batch, unsigned head, int seqlen,
                                  int head_dim, bool is_aligned16) {
  U* first = static_cast<U*>(const_cast<void*>(data)) + batch * stride.batch + head * stride.head;
  return {first, stride.seq, seqlen, head_dim, is_aligned16};
}

}  // namespace andromeda::cuda
