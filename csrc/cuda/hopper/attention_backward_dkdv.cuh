// attention, backward, dk and dv on Hopper: the second pass of attention/backward.cuh, which has the formulas. The
// results are those of attention/backward_dkdv.cuh.
//
// A block owns 128 keys of one key head, and walks over the tiles of 64 queries that see them, of all query heads of
// the key head or of a split of those heads.
//
//                     queries of head 0, of head 1 ...
//                    +----+----+----+----+----+----+
//   keys, group 0    |    |    |    |    |    |    |  -> 64 rows of dk, dv   producer: one warp. It finds the next
//                    +----+----+----+----+----+----+                         tile that touches the block, and TMA
//         group 1    |    |    |    |    |    |    |  -> 64 rows of dk, dv   copies it to the next place of a ring.
//                    +----+----+----+----+----+----+
//
// Keys are the rows, so that P^T and dS^T are operands in registers of the next products. For every tile that touches
// its keys, a group of four warps
//
//   begins S^T = k q^T and dP^T - delta = v dout^T;  waits for S^T
//   P^T = 2^(...);                begins dv += P^T dout;  waits for dP^T
//   dS^T = P^T * (dP^T - delta);  begins dk += dS^T q;    waits for both, and gives the place back
//
// While one group computes P^T and dS^T, the tensor cores have products of the other one, which take longer.
//
// Masked tiles. Elements of hidden pairs are zeros of P^T and dS^T, but 0 * NaN is NaN, and wgmma takes numbers from
// shared memory as they are. A row of q or dout with a number that is not finite makes its whole column of S^T or dP^T
// not finite. Where a group finds such a column in a masked tile, it adds to dk and dv with mma.sync, whose operands
// can be clamped (attention/tile.cuh).
//
//                                               head_dim   64      128
//   registers of a lane: dk, dv                            64      128
//     S^T, dP^T                                            64       64
//     P^T, dS^T as operands                                32       32
//     k, v as operands                                     32        -      highest: 207, 236
//   shared memory: k, v                                    32 KiB   64 KiB
//     q, dout, per place of the ring                       16 KiB   32 KiB
//   clocks for 128 queries and 128 keys: tensor cores    2048     4096
//     shared memory                                      1876     4180
//     exponentials                                       1024     1024
//     issued instructions                                1416     1688      (float16: 1676, 1960)
//
// Products keep shared memory busy for 1024 and 3072 of its clocks: one of 64 columns reads 4 KiB in the 32 clocks of
// the tensor cores if both operands are there. Copies and the numbers of the query rows take the others.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/backward.cuh"
#include "attention/backward_dkdv.cuh"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"
#include "hopper/wgmma.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda::hopper {

inline constexpr int kKeyGroups = 2;                                      // of four warps with 64 keys each
inline constexpr int kKeyRows = kKeyGroups * kWarpgroupRows;              // per block
inline constexpr int kKeyThreads = (1 + kKeyGroups) * kWarpgroupThreads;  // with the producer
inline constexpr int kKeyProducerRegisters = 24;
inline constexpr int kKeyConsumerRegisters = 240;

// Tiles of queries in shared memory.
template <int kHeadDim>
inline constexpr int kKeyStages = kHeadDim == 128 ? 3 : 4;
template <int kHeadDim>
inline constexpr int kKeySharedBytes =
    2 * kTileBytes<kKeyRows, kHeadDim> + kKeyStages<kHeadDim> * 2 * kTileBytes<kBackwardTile, kHeadDim>;

struct KeyGradientMaps {
  CUtensorMap q, k, v, dout;
};

// What the producer says about a tile of queries, beside its rows (QueryTile).
struct __align__(16) QueryPlace {
  int position;      // of query 0
  float slope_log2;  // of the head
  int touched;       // bit g: group g has keys that the tile sees
  int unmasked;      // bit g: all its queries see all keys of group g
};
inline constexpr int kNoMoreTiles = -1;  // as `touched`

// Walks over the query tiles that touch the keys of a block, head by head of a split, as QueryTileIterator does for one
// group of keys. The state is the same in all lanes.
struct QueryTileWalk {
  int head, tile;
  int end_tile;  // of the head: no later tile touches the keys
  float slope;   // of the head
  // Bits of the 32 tiles around `tile`, for each group of keys; those before and at `tile` are gone from `left`.
  unsigned left, touched[kKeyGroups], unmasked[kKeyGroups];

  // Goes on to the next tile, or at the end to a head beyond those of the split.
  __device__ void advance(const AttentionParams& params, const BackwardPlan& plan, int batch, int heads_end, int key) {
    const int first_position = params.seqlen_k - params.seqlen_q;
    int first_tile = tile / kWarpLanes * kWarpLanes;
    while (left == 0) {
      first_tile += kWarpLanes;
      if (first_tile >= end_tile) {
        head += plan.num_head_splits;
        if (head >= heads_end) return;
        const Head constants = describe_head(params, head);
        slope = constants.slope;
        first_tile = 0;
        end_tile = plan.num_query_tiles;
        if (params.causal) {
          // No query before position `key` sees the block; all see themselves, hence nothing beyond their window.
          first_tile = max(key - first_position, 0) / (kBackwardTile * kWarpLanes) * kWarpLanes;
          const long long last_query =
              static_cast<long long>(key) + kKeyRows - 1 + constants.window - 1 - first_position;
          end_tile = static_cast<int>(min(last_query / kBackwardTile + 1, static_cast<long long>(end_tile)));
        }
      }
      const int lane_tile = first_tile + static_cast<int>(threadIdx.x) % kWarpLanes;
      KeyRange key_range{kUnlimited, 0, 0, kUnlimited};
      if (lane_tile < end_tile) key_range = plan.key_ranges[tile_index(params, plan, batch, head, lane_tile)];
#pragma unroll
      for (int group = 0; group < kKeyGroups; ++group) {
        const int first = key + group * kWarpgroupRows, count = min(kWarpgroupRows, params.seqlen_k - first);
        touched[group] = __ballot_sync(kWholeWarp, count > 0 && key_range.touches(first, kWarpgroupRows));
        unmasked[group] = __ballot_sync(kWholeWarp, key_range.is_unmasked(first, count));
        left |= touched[group];
      }
    }
    tile = first_tile + __ffs(left) - 1;
    left &= left - 1;
  }

  // Of a mask for each group, the bits of `tile`.
  __device__ int groups(const unsigned (&mask)[kKeyGroups]) const {
    int bits = 0;
#pragma unroll
    for (int group = 0; group < kKeyGroups; ++group)
      bits |= static_cast<int>(mask[group] >> (tile % kWarpLanes) & 1) << group;
    return bits;
  }
};

// sum += 0 * values: a sum of zeros becomes NaN with the first number that is not finite.
__device__ inline void detect_not_finite(float& sum, const float (&values)[kBackwardTile / 8][4]) {
#pragma unroll
  for (int n = 0; n < kBackwardTile / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(values[n][i], 0.0f, sum);
  }
}

// The A operands of a warp's 16 rows of a tile, for all channels.
template <int kRows, int kHeadDim>
__device__ inline void load_operand(std::uint32_t (&a)[kHeadDim / 16][4], std::uint32_t tile, int row) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  const std::uint32_t base = tile + vec_offset<kRows>(row + (lane & 15), lane >> 4);
#pragma unroll
  for (int step = 0; step < kHeadDim / 16; ++step) {
    ldmatrix(a[step], (base ^ ((step & 3) << 5)) + (step >> 2) * (kRows * kPanelRowBytes));
  }
}

// Adds a tile to dk and dv whose q or dout has numbers that are not finite in rows that some keys do not see. The group
// has no products in flight.
template <typename T, int kHeadDim>
__device__ inline void add_clamped(float (&dk)[1][kHeadDim / 8][4], float (&dv)[1][kHeadDim / 8][4], float& scale,
                                   float (&weights)[1][kBackwardTile / 8][4], float (&ds)[1][kBackwardTile / 8][4],
                                   std::uint32_t q_tile, std::uint32_t dout_tile) {
  // The product clamps a gradient that is not finite, so a NaN is put into the weights.
#pragma unroll
  for (int n = 0; n < kBackwardTile / 8; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      weights[0][n][i] = fmaf(ds[0][n][i], 0.0f, weights[0][n][i]);
      ds[0][n][i] *= weights[0][n][i];
    }
  }
  const auto add = [](float (&result)[1][kHeadDim / 8][4], const float (&values)[1][kBackwardTile / 8][4],
                      std::uint32_t tile) {
#pragma unroll
    for (int step = 0; step < kBackwardTile / 16; ++step) {
      std::uint32_t operand[1][4];
      pack_operand<T>(operand[0], values[0], step);
      multiply_step<T, kHeadDim, kBackwardTile, 1, true>(result, operand, tile, step);
    }
  };
  add(dv, weights, dout_tile);
  scale_gradients<T>(ds, dk, scale);
  add(dk, ds, q_tile);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kKeyThreads, 1)
    attention_backward_dkdv_wgmma_kernel(const __grid_constant__ AttentionBackwardParams params,
                                         const __grid_constant__ BackwardPlan plan,
                                         const __grid_constant__ KeyGradientMaps maps) {
  constexpr int kQueries = kBackwardTile, kStages = kKeyStages<kHeadDim>;
  constexpr int kKeyBytes = kTileBytes<kKeyRows, kHeadDim>, kQueryBytes = kTileBytes<kQueries, kHeadDim>;
  // With 64 channels k and v are operands in registers: with both operands in shared memory, a product of 64 columns
  // keeps it busy all the time.
  constexpr bool kKeysInRegisters = kHeadDim == 64;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  __shared__ __align__(kVec16Bytes) QueryTile rows[kStages];
  __shared__ QueryPlace places[kStages];
  __shared__ std::uint64_t barriers[1 + 2 * kStages];
  const std::uint32_t k_tile = shared_address(shared), v_tile = k_tile + kKeyBytes;
  const auto q_tile = [&](int stage) { return v_tile + kKeyBytes + stage * (2 * kQueryBytes); };
  const auto dout_tile = [&](int stage) { return q_tile(stage) + kQueryBytes; };
  const std::uint32_t keys_full = shared_address(barriers);
  const auto full = [&](int stage) { return keys_full + (1 + stage) * kMbarrierBytes; };
  const auto empty = [&](int stage) { return keys_full + (1 + kStages + stage) * kMbarrierBytes; };

  const AttentionParams& forward = params.forward;
  const auto block = KeyBlock<kKeyRows>::read(forward, plan);
  if (threadIdx.x == 0) {
    init_mbarrier(keys_full, 1);
    for (int stage = 0; stage < kStages; ++stage) {
      init_mbarrier(full(stage), 1);
      init_mbarrier(empty(stage), kKeyGroups * kWarpgroupThreads / kWarpLanes);
    }
    fence_mbarrier_init();
  }
  __syncthreads();

  if (threadIdx.x < kWarpgroupThreads) {
    lower_registers<kKeyProducerRegisters>();
    if (threadIdx.x >= kWarpLanes) return;
    const bool copies = threadIdx.x == 0;
    if (copies) {
      arrive_expect(keys_full, 2 * kKeyBytes);
      copy_tile<kKeyRows, kHeadDim>(k_tile, &maps.k, keys_full, block.key, block.kv_head, block.batch);
      copy_tile<kKeyRows, kHeadDim>(v_tile, &maps.v, keys_full, block.key, block.kv_head, block.batch);
    }
    const int qhead_per_kvhead = forward.num_heads / forward.num_kv_heads,
              heads_end = (block.kv_head + 1) * qhead_per_kvhead;
    QueryTileWalk walk{};
    walk.head = block.kv_head * qhead_per_kvhead + block.head_split - plan.num_head_splits;  // before the first tile
    RingPlace<kStages> place;
#pragma unroll 1
    for (;;) {
      walk.advance(forward, plan, block.batch, heads_end, block.key);
      const bool more = walk.head < heads_end;
      if (copies) {
        const int stage = place.stage;
        wait(empty(stage), place.parity ^ 1);
        if (more) {
          places[stage] = {walk.tile * kQueries + (forward.seqlen_k - forward.seqlen_q), walk.slope * kLog2E,
                           walk.groups(walk.touched), walk.groups(walk.unmasked)};
          arrive_expect(full(stage), 2 * kQueryBytes + static_cast<int>(sizeof(QueryTile)));
          const int query = walk.tile * kQueries;
          copy_tile<kQueries, kHeadDim>(q_tile(stage), &maps.q, full(stage), query, walk.head, block.batch);
          copy_tile<kQueries, kHeadDim>(dout_tile(stage), &maps.dout, full(stage), query, walk.head, block.batch);
          copy_bytes(shared_address(&rows[stage]),
                     plan.tiles + tile_index(forward, plan, block.batch, walk.head, walk.tile), sizeof(QueryTile),
                     full(stage));
        } else {
          places[stage] = {0, 0.0f, kNoMoreTiles, 0};
          arrive(full(stage));
        }
      }
      if (!more) return;
      place.advance();
    }
  }

  raise_registers<kKeyConsumerRegisters>();
  const int group = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / kWarpgroupThreads - 1, 0);
  wait(keys_full, 0);
  std::uint32_t k_operand[kHeadDim / 16][4], v_operand[kHeadDim / 16][4];
  if constexpr (kKeysInRegisters) {
    const int warp_row = (static_cast<int>(threadIdx.x) - kWarpgroupThreads) / kWarpLanes * 16;
    load_operand<kKeyRows, kHeadDim>(k_operand, k_tile, warp_row);
    load_operand<kKeyRows, kHeadDim>(v_operand, v_tile, warp_row);
    pin(k_operand);
    pin(v_operand);
  }
  const auto release = [&](int stage) {
    __syncwarp();  // all lanes have finished with it
    if (read_thread_index() % kWarpLanes == 0) arrive(empty(stage));
  };

  float dk[1][kHeadDim / 8][4] = {}, dv[1][kHeadDim / 8][4] = {}, scale = kFirstGradientScale<T>;
  pin(dk[0]);
  pin(dv[0]);
  RingPlace<kStages> place;
#pragma unroll 1
  for (;; place.advance()) {
    wait(full(place.stage), place.parity);
    const int stage = place.stage;
    const QueryPlace tile = places[stage];
    const int touched = uniform(tile.touched);  // so that the branches are seen to be the same for all lanes
    if (touched == kNoMoreTiles) break;
    if ((touched >> group & 1) == 0) {
      release(stage);
      continue;
    }
    const int column = read_thread_index() % 4 * 2;
    float weights[1][kQueries / 8][4], ds[1][kQueries / 8][4];
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
      const float2 minus_delta = *reinterpret_cast<const float2*>(rows[stage].minus_delta + 8 * n + column);
      ds[0][n][0] = ds[0][n][2] = minus_delta.x;
      ds[0][n][1] = ds[0][n][3] = minus_delta.y;
    }
    // The same in all lanes, too: the descriptors of the products are computed in uniform registers.
    const std::uint32_t q = uniform(q_tile(stage)), dout = q + kQueryBytes;
    pin(weights[0]);
    pin(ds[0]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const std::uint64_t columns = rows_descriptor<kQueries>(q, 0, step);
      if constexpr (kKeysInRegisters) {
        multiply<T, false>(weights[0], k_operand[step], columns, step > 0);
      } else {
        multiply<T, false>(weights[0], rows_descriptor<kKeyRows>(k_tile, group * kWarpgroupRows, step), columns,
                           step > 0);
      }
    }
    commit_products();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      const std::uint64_t columns = rows_descriptor<kQueries>(dout, 0, step);
      if constexpr (kKeysInRegisters) {
        multiply<T, false>(ds[0], v_operand[step], columns);
      } else {
        multiply<T, false>(ds[0], rows_descriptor<kKeyRows>(v_tile, group * kWarpgroupRows, step), columns);
      }
    }
    commit_products();
    wait_products<1>();  // S^T is there
    pin(weights[0]);

    const int index = read_thread_index() - kWarpgroupThreads;
    const int lane_key = block.key + index / kWarpLanes * 16 + index % kWarpLanes / 4;
    const bool unmasked = (uniform(tile.unmasked) >> group & 1) != 0;
    float not_finite = 0.0f;
    if (!unmasked) detect_not_finite(not_finite, weights[0]);
    const auto to_log2_weights = [&](bool left_of_diagonal) {
      scores_to_log2_weights(weights[0], rows[stage], plan.softmax_scale_log2, tile.slope_log2,
                             lane_key - tile.position, left_of_diagonal);
    };
    if (forward.causal || block.key + (group + 1) * kWarpgroupRows - 1 <= tile.position) {
      to_log2_weights(true);
    } else {
      to_log2_weights(false);
    }
    if (!unmasked) apply_key_mask(weights[0], rows[stage], lane_key, -kInfinity);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) weights[0][n][i] = exp2_approx(weights[0][n][i]);
    }
    if (!unmasked) {
      wait_products<0>();
      pin(ds[0]);
      detect_not_finite(not_finite, ds[0]);
      const bool found = any_of_warpgroup<kKeyGroups>(group, isnan(not_finite));
      if (found) {
        apply_key_mask(ds[0], rows[stage], lane_key, 0.0f);
        add_clamped<T, kHeadDim>(dk, dv, scale, weights, ds, q, dout);
        release(stage);
        continue;
      }
    }

    std::uint32_t operand[kQueries / 16][4];
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step) pack_operand<T>(operand[step], weights[0], step);
    pin(operand);
    pin(dv[0]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step) {
      multiply<T, true>(dv[0], operand[step], channels_descriptor<kQueries>(dout, step));
    }
    commit_products();
    wait_products<1>();  // dP^T is there
    pin(ds[0]);
#pragma unroll
    for (int n = 0; n < kQueries / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[0][n][i] *= weights[0][n][i];
    }
    scale_gradients<T>(ds, dk, scale);
    std::uint32_t ds_operand[kQueries / 16][4];
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step) pack_operand<T>(ds_operand[step], ds[0], step);
    pin(ds_operand);
    pin(dk[0]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step) {
      multiply<T, true>(dk[0], ds_operand[step], channels_descriptor<kQueries>(q, step));
    }
    commit_products();
    wait_products<0>();
    pin(dk[0]);
    pin(dv[0]);
    release(stage);
  }
  // The results take the place of k and v, which products of the group's other warps may still read.
  if constexpr (!kKeysInRegisters) synchronize_warpgroup<kKeyGroups>(group);
  store_key_gradients<T, kHeadDim, kKeyRows>(params, plan, dk, dv, scale, k_tile, v_tile,
                                             (static_cast<int>(threadIdx.x) - kWarpgroupThreads) / kWarpLanes * 16);
}

}  // namespace andromeda::cuda::hopper
