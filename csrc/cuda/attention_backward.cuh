// attention, backward (docs/model.md#16.3): three kernels without atomics. Every sum has one owner and a fixed order.
//
//   P  = 2^(scale2 * (q k^T + bias) - lse)      recomputed; log-sum-exps in base 2
//   dP = dout v^T,   delta = <dout, out>,   dS = P * (dP - delta)
//   dq = softmax_scale * dS k,   dk = softmax_scale * dS^T q,   dv = P^T dout
//
// dq kernel: a block owns 128 queries of one head, a warp 32 of them as two groups of 16, and walks over the tiles of
// 32 keys that they see, from the last one to the first.
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
//   Shared memory and tensor cores are what binds it. With two groups a fragment of k or v serves two products: a
//   64 x 64 pair of tiles occupies shared memory for 1408 clocks (704 with 64 channels) in place of 2048 (1024), and
//   the tensor cores for 1536 (768) on 8.0 and 1152 (576) on 9.0. Tiles of 64 keys would need 1152 (576), and 64
//   registers more than there are (one resident block fewer). With two stages the next k and v arrive during all of a
//   tile. With one, where two would cost a resident block, the products are ordered so that each buffer is refilled
//   while the other one is in use: dP (v), then S and dq (k). For the next kernel it leaves what a query row needs
//   beside q and dout (`QueryTile`), and which keys a tile of 64 queries touches (`Reach`).
//
// dk, dv kernel: a block owns 64 keys of one key head, a warp 16 of them, and walks over the tiles of 64 queries that
// see them, of all query heads of the key head or of a share of those.
//
//                 queries of head 0, of head 1 ...      shared: k, v resident; q, dout one buffer each
//            +----+----+----+----+----+----+            registers: dk, dv, P^T, dS^T
//   keys     |    |    |    |    |    |    |  -> dk, dv
//            +----+----+----+----+----+----+
//
//   Keys are the rows here, so that the products P^T and dS^T are the A operands of the next ones without an exchange.
//   Order: S (q), dP (dout), dk (q), dv (dout).
//
// sum kernel: where one key head has too few key tiles to fill the device, its query heads are cut into shares. Each
// leaves its dk and dv in float32, this kernel adds them.
//
// head_dim   shared memory, KiB     registers (float16)            flops per 64 x 64 pair of tiles
//   64       dq 49, dk dv 33        dq 168, dk dv 168              2 * 64 * 64 *  64 * (3 + 4)
//   128      dq 81 or 97, 65        dq 254 (255), 247 (254)        2 * 64 * 64 * 128 * (3 + 4)
//
// One pass would need 5 products instead of 7, and either atomics or an order to add to dq.
#pragma once

#include "attention_tile.cuh"

namespace andromeda::cuda {

inline constexpr int kBackwardThreads = 128;
inline constexpr int kBackwardWarps = kBackwardThreads / kWarpLanes;
inline constexpr int kBackwardTile = 64;  // queries or keys of the dk, dv kernel; a warp owns 16 keys
static_assert(kBackwardTile == 16 * kBackwardWarps);

inline constexpr int kQueryGroups = 2;                              // of 16 rows, per warp of the dq kernel
inline constexpr int kQueryWarpRows = 16 * kQueryGroups;            // one lane describes each
inline constexpr int kQueryRows = kBackwardWarps * kQueryWarpRows;  // per block
inline constexpr int kQueryKeys = 32;                               // per tile
static_assert(kQueryWarpRows == kWarpLanes && kBackwardTile == 2 * kQueryWarpRows);

template <int kHeadDim, int kStages>
inline constexpr int kQuerySharedBytes =
    2 * kTileBytes<kQueryRows, kHeadDim> + kStages * 2 * kTileBytes<kQueryKeys, kHeadDim>;
template <int kHeadDim>
inline constexpr int kKeySharedBytes = 4 * kTileBytes<kBackwardTile, kHeadDim>;

// Per multiprocessor: what shared memory and registers (at most 255 or 168) permit on 8.0 and 9.0.
template <int kHeadDim>
inline constexpr int kBackwardBlocksPerSm = kHeadDim == 128 ? 2 : 3;

// float16 ends at 2^-24, but a key that no query cares for has only small weights and small gradients. So both are
// multiplied by powers of two before they are rounded, and the sums divided by them. A weight is at most 1.
template <typename T>
inline constexpr float kWeightScaleLog2 = std::is_same_v<T, __half> ? 15.0f : 0.0f;
template <typename T>
inline constexpr float kWeightScale = std::is_same_v<T, __half> ? 0x1p15f : 1.0f;
template <typename T>
inline constexpr float kFirstGradientScale = std::is_same_v<T, __half> ? 0x1p24f : 1.0f;

// Multiplies dS by `scale`, and lowers it, and what has been summed with it, to keep the warp's elements below 2^15.
template <typename T, int kGroups, int kTiles, int kSums>
__device__ inline void scale_gradients(float (&ds)[kGroups][kTiles][4], float (&sums)[kGroups][kSums][4],
                                       float& scale) {
  if constexpr (std::is_same_v<T, __half>) {
    float largest = 0.0f;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          ds[group][n][i] *= scale;
          largest = fmaxf(largest, fabsf(ds[group][n][i]));
        }
      }
    }
    if (!__any_sync(kWholeWarp, largest >= 0x1p15f)) return;
    if (__any_sync(kWholeWarp, largest == __int_as_float(0x7f800000))) {
      // Infinities are those of their rows: the others keep their digits.
      largest = 0.0f;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float size = fabsf(ds[group][n][i]);
            if (size < __int_as_float(0x7f800000)) largest = fmaxf(largest, size);
          }
        }
      }
      if (!__any_sync(kWholeWarp, largest >= 0x1p15f)) return;
    }
    // Floats that are not negative are ordered like their bits.
    const int exponent = (__reduce_max_sync(kWholeWarp, __float_as_int(largest)) >> 23) - 127;
    const float ratio = __int_as_float((127 + 14 - exponent) << 23);
    scale *= ratio;
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) ds[group][n][i] *= ratio;
      }
#pragma unroll
      for (int n = 0; n < kSums; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[group][n][i] *= ratio;
      }
    }
  }
}

// A tile of query rows for the dk, dv kernel, one KiB in the workspace and in shared memory. Rows that see no key or do
// not exist have an infinite lse, so that their weights are 0.
struct QueryTile {
  float lse[kBackwardTile];  // base 2, plus slope2 * (row in the tile), minus kWeightScaleLog2: see `weigh`
  float minus_delta[kBackwardTile];
  int first[kBackwardTile], end[kBackwardTile];  // keys that the row sees
};

struct BackwardPlan {
  Reach* reaches;        // (batch, num_heads, num_query_tiles)
  QueryTile* tiles;      // (batch, num_heads, num_query_tiles)
  float* partials;       // (num_shares, 2: dk and dv, batch, seqlen_k, num_kv_heads, built head_dim); one share: unused
  int num_query_tiles;   // of a head
  int num_query_blocks;  // of a head: blocks of the dq kernel
  int num_shares;        // of the query heads of one key head; share s has the heads s, s + num_shares ...
  float scale2;
  bool in_chunks;
};

// Indices are unsigned where they are multiplied in 64 bits: the upper word of a signed one occupies a register.
__device__ inline std::int64_t tile_index(const AttentionParams& params, const BackwardPlan& plan, unsigned batch,
                                          unsigned head, unsigned tile) {
  return (static_cast<std::int64_t>(batch) * params.num_heads + head) * plan.num_query_tiles + tile;
}

// A head of a (batch, seqlen, num_heads, head_dim) tensor. U is T or const T.
template <typename U>
__device__ inline Rows<U> rows_of(const void* data, const SeqStrides& stride, unsigned batch, unsigned head, int seqlen,
                                  int head_dim, bool in_chunks) {
  U* first = static_cast<U*>(const_cast<void*>(data)) + batch * stride.batch + head * stride.head;
  return {first, stride.seq, seqlen, head_dim, in_chunks};
}

// ---- dq -------------------------------------------------------------------------------------------------------------

template <typename T>
__device__ inline Chunk<T> load_shared(std::uint32_t address) {
  uint4 words;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "r"(address)
               : "memory");
  Chunk<T> chunk;
  memcpy(&chunk, &words, sizeof chunk);
  return chunk;
}

// The reach of two sets of rows together.
__device__ inline Reach join(const Reach& a, const Reach& b) {
  return {min(a.begin, b.begin), max(a.end, b.end), max(a.plain_begin, b.plain_begin), min(a.plain_end, b.plain_end)};
}

// <a, b> of row `row` of two tiles.
template <typename T, int kHeadDim>
__device__ inline float multiply_rows(std::uint32_t a, std::uint32_t b, int row) {
  float sum = 0.0f;
#pragma unroll 2
  for (int chunk = 0; chunk < kHeadDim / kChunkWidth<T>; ++chunk) {
    const std::uint32_t offset = chunk_offset<kQueryRows>(row, chunk);
    const Chunk<T> x = load_shared<T>(a + offset), y = load_shared<T>(b + offset);
#pragma unroll
    for (int j = 0; j < Chunk<T>::kPairs; ++j) {
      const float2 left = to_floats(x.pairs[j]), right = to_floats(y.pairs[j]);
      sum = fmaf(left.x, right.x, sum);
      sum = fmaf(left.y, right.y, sum);
    }
  }
  return sum;
}

// The queries of a block, and whose. Longest first: under a causal mask the last queries see most keys, and heads
// without a bias usually come last.
struct QueryBlock {
  int batch, head, kv_head, query;

  // blockIdx.x is read anew: what the loop does not need is not kept in registers over it.
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

// The lane's place: its warp's first row of the tile, and its own first row and column of a result (mma.cuh).
struct QueryPlace {
  int warp_row, row, column;

  __device__ static QueryPlace read() {
    const int thread = read_thread_index(), lane = thread % kWarpLanes;
    return {thread / kWarpLanes * kQueryWarpRows, lane >> 2, 2 * (lane & 3)};
  }
};

// kStages: tiles of k and of v in shared memory.
template <typename T, int kHeadDim, int kStages>
__global__ void __launch_bounds__(kBackwardThreads, kBackwardBlocksPerSm<kHeadDim>)
    attention_backward_dq_kernel(const __grid_constant__ AttentionBackwardParams params,
                                 const __grid_constant__ BackwardPlan plan) {
  constexpr int kKeys = kQueryKeys;
  constexpr int kTiles = kKeys / 8;  // of an accumulator
  constexpr std::uint32_t kStageBytes = 2 * kTileBytes<kKeys, kHeadDim>;
  static_assert(kStages == 1 || kStages == 2);
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  __shared__ KeySpan spans[kQueryRows];
  const std::uint32_t q_tile = shared_address(shared);
  const std::uint32_t dout_tile = q_tile + kTileBytes<kQueryRows, kHeadDim>;
  const std::uint32_t v_tile = dout_tile + kTileBytes<kQueryRows, kHeadDim>;
  const std::uint32_t k_tile = v_tile + kTileBytes<kKeys, kHeadDim>;
  // Of the warps, where keys come last: the spans take the KiB that two blocks of 80 leave each other on 8.0.
  Reach* reaches = reinterpret_cast<Reach*>(shared + kQuerySharedBytes<kHeadDim, kStages>) - kBackwardWarps;

  const AttentionParams& forward = params.forward;
  const QueryBlock block = QueryBlock::read(forward, plan);
  const int batch = block.batch, head = block.head, query = block.query;
  const auto of_queries = [&](const void* data, const SeqStrides& stride) {
    return rows_of<const T>(data, stride, batch, head, forward.seqlen_q, forward.head_dim, plan.in_chunks);
  };
  const auto of_keys = [&](const void* data, const SeqStrides& stride) {
    return rows_of<const T>(data, stride, batch, block.kv_head, forward.seqlen_k, forward.head_dim, plan.in_chunks);
  };
  const Rows<const T> k = of_keys(forward.k, forward.k_stride), v = of_keys(forward.v, forward.v_stride);
  load_tile<kQueryRows, kHeadDim, kBackwardThreads>(dout_tile, of_queries(params.dout, params.dout_stride), query);
  load_tile<kQueryRows, kHeadDim, kBackwardThreads>(q_tile, of_queries(forward.out, forward.out_stride), query);
  cp_async_commit();

  // Which keys the rows see, one row per lane.
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const int warp = static_cast<int>(threadIdx.x) / kWarpLanes, own = static_cast<int>(threadIdx.x);
  const Head constants = describe_head(forward, head);
  const float slope2 = constants.slope * kLog2E;
  const Row row = describe_row(forward, batch, query + own);
  const bool exists = query + own < forward.seqlen_q;
  const Reach reach = Reach::of(row, exists, constants.window).of_warp();
  spans[own] = {row.first, row.end};
  if (lane == 0) reaches[warp] = reach;
  const std::int64_t head_index = static_cast<std::int64_t>(batch) * forward.num_heads + head;
  // A row that sees nothing has no lse. It is hidden everywhere: 0 keeps its exponents free of NaN.
  const float lse =
      exists && !row.empty() ? __ldg(forward.softmax_lse + head_index * forward.seqlen_q + query + own) : 0.0f;
  const float lse2 = lse * kLog2E;
  cp_async_wait<0>();
  __syncthreads();  // spans, reaches and the tiles of dout and out (in the place of q) are complete
  const float minus_delta = -multiply_rows<T, kHeadDim>(dout_tile, q_tile, own);
  Reach all = reaches[0];
#pragma unroll
  for (int i = 1; i < kBackwardWarps; ++i) all = join(all, reaches[i]);

  // For the dk, dv kernel. Two warps describe one of its tiles, which may not exist.
  if (const int tile = (query + own) / kBackwardTile; tile < plan.num_query_tiles) {
    const std::int64_t index = tile_index(forward, plan, batch, head, tile);
    const int tile_row = own % kBackwardTile;
    if (tile_row == 0) plan.reaches[index] = join(reaches[warp], reaches[warp + 1]);
    QueryTile& target = plan.tiles[index];
    target.lse[tile_row] = exists && !row.empty()
                               ? fmaf(slope2, static_cast<float>(tile_row), lse2) - kWeightScaleLog2<T>
                               : __int_as_float(0x7f800000);
    target.minus_delta[tile_row] = minus_delta;
    target.first[tile_row] = exists ? row.first : kUnlimited;
    target.end[tile_row] = exists ? row.end : 0;
  }

  // A lane's rows: g and g + 8 of each of the warp's groups.
  float lse_of[kQueryGroups][2], minus_delta_of[kQueryGroups][2];
#pragma unroll
  for (int group = 0; group < kQueryGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int source = 16 * group + 8 * half + lane / 4;
      minus_delta_of[group][half] = __shfl_sync(kWholeWarp, minus_delta, source);
      lse_of[group][half] = __shfl_sync(kWholeWarp, lse2, source) - lowered_by(half) * slope2;
    }
  }
  const float raw_slope = constants.slope / forward.softmax_scale;

  float dq[kQueryGroups][kHeadDim / 8][4] = {}, scale = kFirstGradientScale<T>;
  const int first_key = uniform(all.begin / kKeys * kKeys);
  int key = uniform(all.begin < all.end ? (all.end - 1) / kKeys * kKeys : -kKeys);
  const auto load_keys = [&](std::uint32_t tile, const Rows<const T>& rows, int first) {
    if (first >= first_key) load_tile<kKeys, kHeadDim, kBackwardThreads>(tile, rows, first);
  };
  __syncthreads();  // everyone has finished with out and the reaches
  if (key >= first_key) {
    load_tile<kQueryRows, kHeadDim, kBackwardThreads>(q_tile, of_queries(forward.q, forward.q_stride), query);
    load_keys(v_tile, v, key);
    if constexpr (kStages == 2) load_keys(k_tile, k, key);
  }
  cp_async_commit();
  std::uint32_t stage = 0;  // in bytes
#pragma unroll 1
  for (; key >= first_key; key -= kKeys) {
    cp_async_wait<0>();
    __syncthreads();  // v, with two stages also k, is there; everyone has finished with the k (and v) before
    if constexpr (kStages == 2) {
      load_keys(v_tile + (stage ^ kStageBytes), v, key - kKeys);
      load_keys(k_tile + (stage ^ kStageBytes), k, key - kKeys);
    } else {
      load_keys(k_tile, k, key);
    }
    cp_async_commit();
    const bool touched = reach.touches(key, kKeys);  // uniform in a warp
    const QueryPlace place = QueryPlace::read();
    float ds[kQueryGroups][kTiles][4];
    if (touched) {  // dP - delta
#pragma unroll
      for (int group = 0; group < kQueryGroups; ++group) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) ds[group][n][i] = minus_delta_of[group][i / 2];
        }
      }
      multiply_transposed<T, kHeadDim, kQueryRows, kKeys>(ds, dout_tile, place.warp_row, v_tile + stage);
    }
    if constexpr (kStages == 1) {
      cp_async_wait<0>();
      __syncthreads();  // k is there; everyone has finished with v
      load_keys(v_tile, v, key - kKeys);
      cp_async_commit();
    }
    if (touched) {
      const int warp_position = query + place.warp_row + (forward.seqlen_k - forward.seqlen_q);
      const int position = warp_position + place.row, lane_key = key + place.column;
      float scores[kQueryGroups][kTiles][4];
      seed_bias(scores, raw_slope, position, lane_key);
      // In two halves: unrolled as a whole, it would begin to load so early that registers do not suffice.
      multiply_transposed<T, kHeadDim, kQueryRows, kKeys, kQueryGroups, kHeadDim / 32>(scores, q_tile, place.warp_row,
                                                                                       k_tile + stage);
      const bool left_of_diagonal = forward.causal || key + kKeys - 1 <= warp_position;
      if (!left_of_diagonal) mirror_bias(scores, raw_slope, position, lane_key);
      const bool plain = reach.is_plain(key, kKeys);
      if (!plain) hide(scores, spans + place.warp_row, lane_key, ds);
#pragma unroll
      for (int group = 0; group < kQueryGroups; ++group) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            ds[group][n][i] *= exp2_approx(fmaf(scores[group][n][i], plan.scale2, -lse_of[group][i / 2]));
          }
        }
      }
      scale_gradients<T>(ds, dq, scale);
      const auto add_to_dq = [&](auto clamped) {
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
          std::uint32_t operand[kQueryGroups][4];
#pragma unroll
          for (int group = 0; group < kQueryGroups; ++group) pack_operand<T>(operand[group], ds[group], step);
          multiply_step<T, kHeadDim, kKeys, kQueryGroups, decltype(clamped)::value>(dq, operand, k_tile + stage, step);
        }
      };
      if (plain) {
        add_to_dq(std::false_type{});
      } else {
        add_to_dq(std::true_type{});
      }
    }
    if constexpr (kStages == 2) stage ^= kStageBytes;
  }
  const float unscale = forward.softmax_scale / scale;
  const float factor[kQueryGroups][2] = {{unscale, unscale}, {unscale, unscale}};
  const QueryBlock owned = QueryBlock::read(forward, plan);  // the same as `block`
  const int warp_row = QueryPlace::read().warp_row;
  const Rows<T> dq_rows = rows_of<T>(params.dq, params.dq_stride, owned.batch, owned.head, forward.seqlen_q,
                                     forward.head_dim, plan.in_chunks);
  store_rows<T, kHeadDim, kQueryRows>(dq_rows, owned.query + warp_row, dq, factor, q_tile, warp_row);
}

// ---- dk, dv ---------------------------------------------------------------------------------------------------------

// The keys of a block, and whose. Longest first: under a causal mask the first keys are seen by most queries.
struct KeyBlock {
  int batch, kv_head, share, key;

  // blockIdx.x is read anew: what the loop does not need is not kept in registers over it.
  __device__ static KeyBlock read(const AttentionParams& params, const BackwardPlan& plan) {
    unsigned block;
    asm volatile("mov.u32 %0, %%ctaid.x;\n" : "=r"(block));
    KeyBlock result;
    result.batch = block % params.batch;
    block /= params.batch;
    result.kv_head = block % params.num_kv_heads;
    block /= params.num_kv_heads;
    result.share = block % plan.num_shares;
    result.key = block / plan.num_shares * kBackwardTile;
    return result;
  }
};

// Walks over the query tiles of a share's heads that touch the keys of a block, head by head. The reaches of 32 tiles
// are read at once, one per lane; the state is the same in all lanes and warps.
struct Visit {
  int head, tile;
  unsigned touched, plain;  // of the 32 tiles around `tile`: those that are still to be visited; that need no mask

  __device__ bool is_plain() const { return (plain >> (tile % kWarpLanes) & 1) != 0; }

  // On to the next tile, or to a head that is not one of the share.
  __device__ void advance(const AttentionParams& params, const BackwardPlan& plan, int batch, int heads_end, int key) {
    int chunk = tile / kWarpLanes * kWarpLanes;
    while (touched == 0) {
      chunk += kWarpLanes;
      if (chunk >= plan.num_query_tiles) {
        head += plan.num_shares;
        if (head >= heads_end) return;
        // Under a causal mask no query before position `key` sees the block.
        const int first_query = params.causal ? max(key - (params.seqlen_k - params.seqlen_q), 0) : 0;
        chunk = first_query / (kBackwardTile * kWarpLanes) * kWarpLanes;
      }
      const int lane_tile = chunk + read_thread_index() % kWarpLanes;
      Reach reach{kUnlimited, 0, 0, kUnlimited};
      if (lane_tile < plan.num_query_tiles) reach = plan.reaches[tile_index(params, plan, batch, head, lane_tile)];
      touched = __ballot_sync(kWholeWarp, reach.touches(key, kBackwardTile));
      plain = __ballot_sync(kWholeWarp, reach.is_plain(key, min(kBackwardTile, params.seqlen_k - key)));
    }
    tile = chunk + __ffs(touched) - 1;
    touched &= touched - 1;
  }
};

// Scores to exponents of the weights, times kWeightScale. Rows are keys, `distance` = key of the lane's row g -
// position of the tile's query 0; columns are queries.
//
// Left of the diagonal, -slope2 * (position - key) - lse is one difference, slope2 * distance - (lse + slope2 *
// column), whose right side the dq kernel has prepared.
__device__ inline void weigh(float (&scores)[kBackwardTile / 8][4], const QueryTile& tile, float scale2, float slope2,
                             int distance, bool left_of_diagonal) {
  const int column = read_thread_index() % 4 * 2;
#pragma unroll
  for (int n = 0; n < kBackwardTile / 8; ++n) {
    const float2 lse = *reinterpret_cast<const float2*>(tile.lse + 8 * n + column);
    const float lse_of[2] = {lse.x, lse.y};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float row_distance = static_cast<float>(distance + i / 2 * 8);
      const float query = static_cast<float>(column + 8 * n + i % 2);
      const float exponent = left_of_diagonal
                                 ? fmaf(slope2, row_distance, -lse_of[i % 2])
                                 : fmaf(-slope2, fabsf(row_distance - query), fmaf(slope2, query, -lse_of[i % 2]));
      scores[n][i] = fmaf(scores[n][i], scale2, exponent);
    }
  }
}

// Sets what the queries do not see to `value`; `key` is that of the lane's row g.
__device__ inline void hide_keys(float (&scores)[kBackwardTile / 8][4], const QueryTile& tile, int key, float value) {
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

// Rows of a float32 partial result; `target` is its row 0, rows are kHeadDim wide.
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

// Writes dk and dv of a block, or the partial ones of its share; `scale` is that of dk. The tiles are free.
template <typename T, int kHeadDim>
__device__ inline void store_key_gradients(const AttentionBackwardParams& params, const BackwardPlan& plan,
                                           const float (&dk)[1][kHeadDim / 8][4], const float (&dv)[1][kHeadDim / 8][4],
                                           float scale, std::uint32_t k_tile, std::uint32_t v_tile) {
  const AttentionParams& forward = params.forward;
  const KeyBlock block = KeyBlock::read(forward, plan);
  const int warp_row = static_cast<int>(threadIdx.x) / kWarpLanes * 16;
  const int row = block.key + warp_row;
  constexpr float dv_factor = 1.0f / kWeightScale<T>;
  const float dk_factor = forward.softmax_scale / scale * dv_factor;
  if (plan.num_shares == 1) {
    const auto target = [&](void* data, const SeqStrides& stride) {
      return rows_of<T>(data, stride, block.batch, block.kv_head, forward.seqlen_k, forward.head_dim, plan.in_chunks);
    };
    const float dk_factors[1][2] = {{dk_factor, dk_factor}}, dv_factors[1][2] = {{dv_factor, dv_factor}};
    store_rows<T, kHeadDim, kBackwardTile, 1>(target(params.dk, params.dk_stride), row, dk, dk_factors, k_tile,
                                              warp_row);
    store_rows<T, kHeadDim, kBackwardTile, 1>(target(params.dv, params.dv_stride), row, dv, dv_factors, v_tile,
                                              warp_row);
  } else {
    const std::int64_t row_stride = static_cast<std::int64_t>(forward.num_kv_heads) * kHeadDim;
    const std::int64_t size = row_stride * forward.batch * forward.seqlen_k;  // of dk or dv
    float* rows = plan.partials + 2 * block.share * size +
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
  constexpr int kTiles = kTile / 8;  // of an accumulator
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  __shared__ __align__(kChunkBytes) QueryTile tile;
  const std::uint32_t k_tile = shared_address(shared);
  const std::uint32_t v_tile = k_tile + kTileBytes<kTile, kHeadDim>;
  const std::uint32_t q_tile = v_tile + kTileBytes<kTile, kHeadDim>;
  const std::uint32_t dout_tile = q_tile + kTileBytes<kTile, kHeadDim>;

  const AttentionParams& forward = params.forward;
  const KeyBlock block = KeyBlock::read(forward, plan);
  const int batch = block.batch, key = block.key;
  const auto of_keys = [&](const void* data, const SeqStrides& stride) {
    return rows_of<const T>(data, stride, batch, block.kv_head, forward.seqlen_k, forward.head_dim, plan.in_chunks);
  };
  load_tile<kTile, kHeadDim, kBackwardThreads>(k_tile, of_keys(forward.k, forward.k_stride), key);
  load_tile<kTile, kHeadDim, kBackwardThreads>(v_tile, of_keys(forward.v, forward.v_stride), key);

  const int group = forward.num_heads / forward.num_kv_heads, heads_end = (block.kv_head + 1) * group;
  Visit visit{block.kv_head * group + block.share - plan.num_shares, plan.num_query_tiles, 0,
              0};  // before the first one
  const auto load_queries = [&] {
    load_tile<kTile, kHeadDim, kBackwardThreads>(q_tile,
                                                 rows_of<const T>(forward.q, forward.q_stride, batch, visit.head,
                                                                  forward.seqlen_q, forward.head_dim, plan.in_chunks),
                                                 visit.tile * kTile);
    constexpr int kChunks = sizeof(QueryTile) / kChunkBytes;
    static_assert(sizeof(QueryTile) % kChunkBytes == 0 && kChunks <= kBackwardThreads);
    const int thread = read_thread_index();
    if (thread < kChunks) {
      const QueryTile* source = plan.tiles + tile_index(forward, plan, batch, visit.head, visit.tile);
      cp_async(shared_address(&tile) + thread * kChunkBytes, reinterpret_cast<const uint4*>(source) + thread,
               kChunkBytes);
    }
  };

  float dk[1][kHeadDim / 8][4] = {}, dv[1][kHeadDim / 8][4] = {}, scale = kFirstGradientScale<T>;
  visit.advance(forward, plan, batch, heads_end, key);
  if (visit.head < heads_end) load_queries();
  cp_async_commit();
#pragma unroll 1
  while (visit.head < heads_end) {
    cp_async_wait<0>();
    __syncthreads();  // q and `tile` (at first also k and v) are there; everyone has finished with the dout before
    load_tile<kTile, kHeadDim, kBackwardThreads>(dout_tile,
                                                 rows_of<const T>(params.dout, params.dout_stride, batch, visit.head,
                                                                  forward.seqlen_q, forward.head_dim, plan.in_chunks),
                                                 visit.tile * kTile);
    cp_async_commit();
    const float slope2 = forward.alibi_slopes == nullptr ? 0.0f : __ldg(forward.alibi_slopes + visit.head) * kLog2E;
    const int position = visit.tile * kTile + (forward.seqlen_k - forward.seqlen_q);
    const int thread = read_thread_index();
    const int lane = thread % kWarpLanes, warp_row = thread / kWarpLanes * 16;
    const int lane_key = key + warp_row + lane / 4;
    float weights[1][kTiles][4] = {};
    multiply_transposed<T, kHeadDim, kTile, kTile, 1>(weights, k_tile, warp_row, q_tile);
    weigh(weights[0], tile, plan.scale2, slope2, lane_key - position, forward.causal || key + kTile - 1 <= position);
    const bool plain = uniform(visit.is_plain()) != 0;  // it is needed to the end of the loop
    if (!plain) hide_keys(weights[0], tile, lane_key, -__int_as_float(0x7f800000));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[0][n][i] = exp2_approx(weights[0][n][i]);
    }
    float ds[1][kTiles][4];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      const float2 minus_delta = *reinterpret_cast<const float2*>(tile.minus_delta + 8 * n + lane % 4 * 2);
      ds[0][n][0] = ds[0][n][2] = minus_delta.x;
      ds[0][n][1] = ds[0][n][3] = minus_delta.y;
    }
    cp_async_wait<0>();
    __syncthreads();  // dout is there
    multiply_transposed<T, kHeadDim, kTile, kTile, 1>(ds, v_tile, warp_row, dout_tile);
    if (!plain) {
      hide_keys(ds[0], tile, lane_key, 0.0f);
      // A gradient that is not finite would be clamped in the product: its weights carry it.
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) weights[0][n][i] = fmaf(ds[0][n][i], 0.0f, weights[0][n][i]);
      }
    }
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
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
    if (plain) {
      add_to_dk(std::false_type{});
    } else {
      add_to_dk(std::true_type{});
    }
    visit.advance(forward, plan, batch, heads_end, key);
    __syncthreads();  // everyone has finished with q and `tile`
    if (visit.head < heads_end) load_queries();
    cp_async_commit();
    const auto add_to_dv = [&](auto clamped) {
#pragma unroll
      for (int step = 0; step < kTile / 16; ++step) {
        multiply_step<T, kHeadDim, kTile, 1, decltype(clamped)::value>(dv, weight_operands[step], dout_tile, step);
      }
    };
    if (plain) {
      add_to_dv(std::false_type{});
    } else {
      add_to_dv(std::true_type{});
    }
  }

  cp_async_wait<0>();
  __syncthreads();  // without any visit nobody has waited for k and v, which pass on the results
  store_key_gradients<T, kHeadDim>(params, plan, dk, dv, scale, k_tile, v_tile);
}

// ---- sums over shares -----------------------------------------------------------------------------------------------

inline constexpr int kSumThreads = 256;

// One thread adds one chunk of channels of dk or dv, the shares in ascending order, and rounds once. There are few
// keys, or there would be one share: their chunks are counted in an int.
template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kSumThreads)
    attention_backward_sum_kernel(const __grid_constant__ AttentionBackwardParams params,
                                  const __grid_constant__ BackwardPlan plan) {
  constexpr int kChunks = kHeadDim / kChunkWidth<T>;  // of a row
  const AttentionParams& forward = params.forward;
  const int num_chunks = forward.batch * forward.seqlen_k * forward.num_kv_heads * kChunks;  // of dk or dv
  const int index = blockIdx.x * kSumThreads + threadIdx.x;
  const int channel = index % kChunks * kChunkWidth<T>;
  const int channels = forward.head_dim - channel;
  if (index >= 2 * num_chunks || channels <= 0) return;
  float sums[kChunkWidth<T>] = {};
#pragma unroll 2
  for (int share = 0; share < plan.num_shares; ++share) {
    const float4* source = reinterpret_cast<const float4*>(plan.partials) +
                           (static_cast<std::int64_t>(2 * share) * num_chunks + index) * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 four = __ldcs(source + i);
      sums[4 * i] += four.x;
      sums[4 * i + 1] += four.y;
      sums[4 * i + 2] += four.z;
      sums[4 * i + 3] += four.w;
    }
  }
  const bool is_dk = index < num_chunks;
  const int row = (is_dk ? index : index - num_chunks) / kChunks;
  const int kv_head = row % forward.num_kv_heads;
  const int key = row / forward.num_kv_heads % forward.seqlen_k;
  const int batch = row / forward.num_kv_heads / forward.seqlen_k;
  Chunk<T> rounded;
#pragma unroll
  for (int i = 0; i < Chunk<T>::kPairs; ++i) {
    rounded.pairs[i] = from_floats<T>(make_float2(sums[2 * i], sums[2 * i + 1]));
  }
  const SeqStrides& stride = is_dk ? params.dk_stride : params.dv_stride;
  T* target = static_cast<T*>(is_dk ? params.dk : params.dv) + batch * stride.batch + key * stride.seq +
              kv_head * stride.head + channel;
  if (plan.in_chunks) {
    store<Access::kChunk>(target, rounded, channels);
  } else {
    const T* elements = reinterpret_cast<const T*>(&rounded);
#pragma unroll
    for (int i = 0; i < kChunkWidth<T>; ++i) {
      if (i < channels) target[i] = elements[i];
    }
  }
}

}  // namespace andromeda::cuda
