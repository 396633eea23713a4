// attention, backward, on Hopper: dq, and the numbers of every query row that the dk, dv kernel needs.
// attention/backward.cuh has the formulas.
//
// A block owns 128 queries of one head: two consumer warpgroups, 64 queries each. It walks over the tiles of 128 keys
// that its queries see, from the last one to the first. A producer warpgroup, of which two threads work, has TMA copy
// them.
//
//               keys, 128 per tile            registers of a consumer's lane      head_dim   64     128
//             <- processed leftwards          dq, float32                                    32      64
//            +-------+-------+-------+        S, then the next S                             64      64
//   group 0  |       |       |       |        dP, then the next dP                           64      64
//            +-------+-------+-------+ -> dq  dS, 16 bits                                    32      32
//   group 1  |       |       |       |
//            +-------+-------+-------+        shared memory
//                                             q, dout resident: 128 rows                 32 KiB  64 KiB
//                                             k, v: 128 rows, two stages                 64 KiB 128 KiB
//
// A consumer, for each tile:
//
//   S is ready: P = 2^(S - lse), while the tensor cores compute dP
//   dP is ready, v is free: dS = P * dP, in 16 bits
//   begin dq += dS k; bias of the next tile, while the tensor cores compute dq; begin S of the next tile
//   dq is ready, k is free: begin dP of the next tile, while the tensor cores compute S
//
// So they have a product to go on with but for the instructions between dP and dq, when they work for the other
// warpgroup. dP waits for dq because there are no registers for both it and the operand of dq. Tiles with masks, or
// right of the diagonal with a bias, and the last tile go through a second, slower copy of these steps.
//
// Of a multiprocessor, for 128 queries and 128 keys:
//
//   head_dim   tensor cores   shared memory                      exponentials   instructions per sub-core, bfloat16
//    64        1536 clocks    1312 (operands 1056, TMA 256)      1024            914
//   128        3072           2592 (operands 2080, TMA 512)      1024           1004
//
// One block is resident. The tiles of q and dout begin to arrive before the block knows which keys it needs.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "attention/alibi.cuh"
#include "attention/backward.cuh"
#include "attention/mask.cuh"
#include "attention/softmax.cuh"
#include "attention/tile.cuh"
#include "hopper/mbarrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/warpgroup.cuh"
#include "hopper/wgmma.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda::hopper {

inline constexpr int kDqConsumers = 2;                                     // warpgroups
inline constexpr int kDqThreads = (1 + kDqConsumers) * kWarpgroupThreads;  // with the producer
inline constexpr int kDqKeys = 128;                                        // per tile
inline constexpr int kDqStages = 2;
inline constexpr int kDqConsumerWarps = kDqConsumers * (kWarpgroupThreads / kWarpLanes);
static_assert(kQueryRows == 2 * kWarpgroupRows && kWarpgroupRows == kBackwardTile);

template <int kHeadDim>
inline constexpr int kDqSharedBytes =
    2 * kTileBytes<kQueryRows, kHeadDim> + kDqStages * 2 * kTileBytes<kDqKeys, kHeadDim>;

// Of the pairs below, the first belongs to S, the second to dP. A warp of the producer serves each: v is free before k,
// and must not wait for it.
struct DqMaps {
  CUtensorMap queries[2];  // q, dout
  CUtensorMap keys[2];     // k, v
};

// What a query row needs during the loop; `first` and `end` are for apply_mask().
struct DqRow {
  int first, end;  // keys that it sees
  float lse_log2, minus_delta;
};

struct DqBarriers {
  std::uint64_t queries_full[2], full[2][kDqStages], empty[2][kDqStages];
};

// The keys that kCount query rows from `query` on see; the same in all lanes.
template <int kCount>
__device__ inline KeyRange keys_of_queries(const AttentionParams& params, int batch, int query, int window) {
  KeyRange keys{kUnlimited, 0, 0, kUnlimited};
#pragma unroll
  for (int i = 0; i < kCount; i += kWarpLanes) {
    const int own = query + i + static_cast<int>(threadIdx.x) % kWarpLanes;
    keys = keys.join(KeyRange::of(describe_row(params, batch, own), own < params.seqlen_q, window));
  }
  return keys.of_warp();
}

// The first keys of the tiles that a range of keys touches, in uniform registers.
struct KeyTiles {
  int first, last;

  __device__ static KeyTiles of(const KeyRange& keys) {
    const bool is_empty = keys.begin >= keys.end;
    return {uniform(is_empty ? 0 : keys.begin / kDqKeys * kDqKeys),
            uniform(is_empty ? -kDqKeys : (keys.end - 1) / kDqKeys * kDqKeys)};
  }
  __device__ bool empty() const { return last < first; }
};

// Sets minus_delta of 16 rows of a block, those of a warp, to -<dout, out>. `first` is the first row in the tensors.
template <typename T, int kHeadDim>
__device__ inline void compute_minus_delta(DqRow* rows, const Rows<const T>& dout, const Rows<const T>& out,
                                           int first) {
  constexpr int kVecs = kHeadDim / kVec16Width<T>;  // of a row; a lane has one
  constexpr int kRowStep = kWarpLanes / kVecs;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes, vec = lane % kVecs;
#pragma unroll
  for (int i = 0; i < 16; i += kRowStep) {
    const int row = i + lane / kVecs;
    const bool inside = first + row < out.count && vec * kVec16Width<T> < out.head_dim;
    const auto load = [&](const Rows<const T>& source) {
      uint4 bits = make_uint4(0, 0, 0, 0);
      if (inside) {
        bits = __ldg(reinterpret_cast<const uint4*>(source.data + (first + row) * source.stride) + vec);
      }
      Vec16<T> result;
      memcpy(&result, &bits, sizeof result);
      return result;
    };
    const Vec16<T> x = load(dout), y = load(out);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < Vec16<T>::kPairs; ++j) {
      const float2 left = to_floats(x.pairs[j]), right = to_floats(y.pairs[j]);
      sum = fmaf(left.x, right.x, sum);
      sum = fmaf(left.y, right.y, sum);
    }
#pragma unroll
    for (int offset = kVecs / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kWholeWarp, sum, offset);
    if (vec == 0) rows[row].minus_delta = -sum;
  }
}

// Whether one of the lane's values is not finite.
template <int kColumnTiles>
__device__ inline bool has_not_finite(const float (&values)[kColumnTiles][4]) {
  float sum = 0.0f;
#pragma unroll
  for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sum = fmaf(values[n][i], 0.0f, sum);
  }
  return !(sum == 0.0f);
}

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kDqThreads, 1)
    attention_backward_dq_wgmma_kernel(const __grid_constant__ AttentionBackwardParams params,
                                       const __grid_constant__ BackwardPlan plan, const __grid_constant__ DqMaps maps) {
  constexpr int kKeys = kDqKeys;
  constexpr int kColumnTiles = kKeys / 8;  // of S and dP
  constexpr int kQueryBytes = kTileBytes<kQueryRows, kHeadDim>, kKeyBytes = kTileBytes<kKeys, kHeadDim>;
  extern __shared__ __align__(kTileAlignment) unsigned char shared[];
  __shared__ __align__(sizeof(DqRow)) DqRow rows[kQueryRows];
  __shared__ DqBarriers barriers;
  const std::uint32_t q_tile = shared_address(shared);
  const std::uint32_t dout_tile = q_tile + kQueryBytes;
  const std::uint32_t k_tiles = dout_tile + kQueryBytes;
  const std::uint32_t v_tiles = k_tiles + kDqStages * kKeyBytes;
  const std::uint32_t q_full = shared_address(barriers.queries_full), dout_full = q_full + kMbarrierBytes;
  const std::uint32_t k_full = shared_address(barriers.full[0]), v_full = shared_address(barriers.full[1]);
  const std::uint32_t k_empty = shared_address(barriers.empty[0]), v_empty = shared_address(barriers.empty[1]);

  if (threadIdx.x == 0) {
    init_mbarrier(q_full, 1);
    init_mbarrier(dout_full, 1);
#pragma unroll
    for (int stage = 0; stage < kDqStages; ++stage) {
      init_mbarrier(k_full + stage * kMbarrierBytes, 1);
      init_mbarrier(v_full + stage * kMbarrierBytes, 1);
      init_mbarrier(k_empty + stage * kMbarrierBytes, kDqConsumerWarps);
      init_mbarrier(v_empty + stage * kMbarrierBytes, kDqConsumerWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();  // the mbarriers are ready

  const AttentionParams& forward = params.forward;
  const QueryBlock block = QueryBlock::read(forward, plan);
  const int batch = block.batch, head = block.head, query = block.query;
  RingPlace<kDqStages> place;

  if (threadIdx.x < kWarpgroupThreads) {  // the producer
    lower_registers<24>();
    const int warp = uniform(static_cast<int>(threadIdx.x) / kWarpLanes);
    const bool is_first_lane = threadIdx.x % kWarpLanes == 0;
    if (warp > 1) return;
    if (is_first_lane) {  // these do not wait for the window of the head
      const std::uint32_t full = q_full + warp * kMbarrierBytes;
      arrive_expect(full, kQueryBytes);
      copy_tile<kQueryRows, kHeadDim>(q_tile + warp * kQueryBytes, maps.queries + warp, full, query, head, batch);
    }
    const Head constants = describe_head(forward, head);
    const KeyTiles tiles = KeyTiles::of(keys_of_queries<kQueryRows>(forward, batch, query, constants.window));
    if (!is_first_lane) return;
#pragma unroll 1
    for (int key = tiles.last; key >= tiles.first; key -= kKeys, place.advance()) {
      const int index = warp * kDqStages + place.stage;
      const std::uint32_t full = k_full + index * kMbarrierBytes;
      wait(k_empty + index * kMbarrierBytes, place.parity ^ 1);
      arrive_expect(full, kKeyBytes);
      copy_tile<kKeys, kHeadDim>(k_tiles + index * kKeyBytes, maps.keys + warp, full, key, block.kv_head, batch);
    }
    return;
  }
  raise_registers<240>();

  const int thread = static_cast<int>(threadIdx.x) - kWarpgroupThreads, lane = thread % kWarpLanes;
  const int group = uniform(thread / kWarpgroupThreads), warp_row = uniform(thread / kWarpLanes * 16);
  const int group_row = group * kWarpgroupRows, group_query = query + group_row;
  const Head constants = describe_head(forward, head);
  const float slope_log2 = constants.slope * kLog2E;

  // The numbers of the warp's rows, one row per lane.
  const auto of_queries = [&](const void* data, const SeqStrides& stride) {
    return rows_of<const T>(data, stride, batch, head, forward.seqlen_q, forward.head_dim, plan.is_aligned16);
  };
  compute_minus_delta<T, kHeadDim>(rows + warp_row, of_queries(params.dout, params.dout_stride),
                                   of_queries(forward.out, forward.out_stride), query + warp_row);
  const int own = warp_row + lane % 16;
  const Row row = describe_row(forward, batch, query + own);
  const bool exists = query + own < forward.seqlen_q, has_lse = exists && !row.empty();
  const std::int64_t head_index = static_cast<std::int64_t>(batch) * forward.num_heads + head;
  // A row that sees no key has no lse. It is masked everywhere: 0 keeps its exponents free of NaN.
  const float lse = has_lse ? __ldg(forward.softmax_lse + head_index * forward.seqlen_q + query + own) : 0.0f;
  const float lse_log2 = lse * kLog2E;
  if (lane < 16) rows[own].first = row.first, rows[own].end = row.end, rows[own].lse_log2 = lse_log2;
  __syncwarp();  // the warp's rows are complete

  // Write the numbers for the dk, dv kernel. A warpgroup has one of its tiles, which may not exist.
  const KeyRange of_group = keys_of_queries<kWarpgroupRows>(forward, batch, group_query, constants.window);
  if (const int tile = group_query / kBackwardTile; tile < plan.num_query_tiles) {
    const std::int64_t index = tile_index(forward, plan, batch, head, tile);
    if (thread % kWarpgroupThreads == 0) plan.key_ranges[index] = of_group;
    if (const int tile_row = own % kBackwardTile; lane < 16) {
      QueryTile& target = plan.tiles[index];
      target.lse[tile_row] =
          has_lse ? fmaf(slope_log2, static_cast<float>(tile_row), lse_log2) - kWeightScaleLog2<T> : kInfinity;
      target.minus_delta[tile_row] = rows[own].minus_delta;
      target.first[tile_row] = exists ? row.first : kUnlimited;
      target.end[tile_row] = exists ? row.end : 0;
    }
  }

  float lse_of[2], minus_delta_of[2];  // of the lane's rows g and g + 8
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const DqRow& own_row = rows[warp_row + 8 * half + lane / 4];
    lse_of[half] = own_row.lse_log2 - lowered_by(half) * slope_log2;
    minus_delta_of[half] = own_row.minus_delta;
  }
  const float raw_slope = constants.slope / forward.softmax_scale;
  const int group_position = group_query + (forward.seqlen_k - forward.seqlen_q);
  const int position = group_position + warp_row % kWarpgroupRows + lane / 4, column = lane % 4 * 2;

  float dq[1][kHeadDim / 8][4] = {}, scale = kFirstGradientScale<T>;
  float scores[1][kColumnTiles][4], ds[1][kColumnTiles][4];
  std::uint32_t operand[kKeys / 16][4];

  const auto wait_for_values = [&] { wait(v_full + place.stage * kMbarrierBytes, place.parity); };
  // The products of a tile, whose place in the ring is `place`, begin: S with the bias,
  const auto begin_scores = [&](int key) {
    wait(k_full + place.stage * kMbarrierBytes, place.parity);  // before the bias, or that would come before dq
    seed_bias(scores, raw_slope, position, key + column);
    pin(scores[0]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      multiply<T, false>(scores[0], rows_descriptor<kQueryRows>(q_tile, group_row, step),
                         rows_descriptor<kKeys>(k_tiles + place.stage * kKeyBytes, 0, step));
    }
    commit_products();
  };
  // dP - delta, after wait_for_values(),
  const auto begin_gradients = [&] {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[0][n][i] = minus_delta_of[i / 2];
    }
    pin(ds[0]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      multiply<T, false>(ds[0], rows_descriptor<kQueryRows>(dout_tile, group_row, step),
                         rows_descriptor<kKeys>(v_tiles + place.stage * kKeyBytes, 0, step));
    }
    commit_products();
  };
  // and dq += dS k.
  const auto begin_dq = [&](std::uint32_t k_tile) {
    pin(operand);
    pin(dq[0]);
    fence_products();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      multiply<T, true>(dq[0], operand[step], channels_descriptor<kKeys>(k_tile, step));
    }
    commit_products();
  };
  // Scores become weights.
  const auto exponentiate = [&] {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scores[0][n][i] = exp2_approx(fmaf(scores[0][n][i], plan.softmax_scale_log2, -lse_of[i / 2]));
      }
    }
  };
  // dP - delta becomes dS, and dS the operand of dq.
  const auto make_operand = [&] {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) ds[0][n][i] *= scores[0][n][i];
    }
    scale_gradients<T>(ds, dq, scale);
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) pack_operand<T>(operand[step], ds[0], step);
  };
  const auto release = [&](std::uint32_t empty, int stage) {
    if (lane == 0) arrive(empty + stage * kMbarrierBytes);
  };

  const KeyRange of_others =
      keys_of_queries<kWarpgroupRows>(forward, batch, query + kWarpgroupRows - group_row, constants.window);
  const KeyTiles all = KeyTiles::of(of_group.join(of_others)), tiles = KeyTiles::of(of_group);
  int key = all.last;
  // Tiles that only the other warpgroup needs, down to the one at `end`.
  const auto skip_tiles = [&](int end) {
#pragma unroll 1
    for (; key >= end; key -= kKeys, place.advance()) {
      wait(k_full + place.stage * kMbarrierBytes, place.parity);
      release(k_empty, place.stage);
      wait(v_full + place.stage * kMbarrierBytes, place.parity);
      release(v_empty, place.stage);
    }
  };
  // Whether all rows of the warpgroup see all keys of a tile, and the bias of the seeds is right for them.
  const int unmasked_begin = uniform(of_group.unmasked_begin), unmasked_end = uniform(of_group.unmasked_end);
  const bool is_one_sided = uniform(forward.causal || raw_slope == 0.0f) != 0;
  const auto is_plain = [&](int key) {
    return unmasked_begin <= key && key + kKeys <= unmasked_end && (is_one_sided || key + kKeys - 1 <= group_position);
  };

  wait(q_full, 0);
  skip_tiles(max(all.first, tiles.last + kKeys));
  if (tiles.empty()) {
    wait(dout_full, 0);  // no block may end before its copies
  } else {
    pin(dq[0]);
    begin_scores(key);
    wait(dout_full, 0);
    wait_for_values();
    begin_gradients();
    wait_products<1>();  // S is ready
    pin(scores[0]);
#pragma unroll 1
    while (true) {
#pragma unroll 1
      while (key > tiles.first && is_plain(key)) {
        const int stage = place.stage;
        place.advance();
        exponentiate();
        // Early: the compiler would move the exponentials behind the wait for dP, but not past a branch.
        pin(scores[0]);
        wait_for_values();
        wait_products<0>();  // dP is ready
        pin(ds[0]);
        release(v_empty, stage);
        make_operand();
        begin_dq(k_tiles + stage * kKeyBytes);
        key -= kKeys;
        begin_scores(key);
        wait_products<1>();  // dq is ready
        release(k_empty, stage);
        begin_gradients();
        wait_products<1>();  // S is ready
        pin(scores[0]);
      }
      const int stage = place.stage;
      const std::uint32_t k_tile = k_tiles + stage * kKeyBytes;
      place.advance();
      wait_products<0>();  // dP is ready
      pin(ds[0]);
      release(v_empty, stage);
      bool is_clamped = false;
      if (!is_plain(key)) {
        if (!is_one_sided) mirror_bias(scores, raw_slope, position, key + column);
        // A hidden key has the weight 0, and 0 * NaN is NaN. A key with a number that is not finite makes a column of S
        // not finite, in all rows.
        is_clamped = uniform(any_of_warpgroup<kDqConsumers>(group, has_not_finite(scores[0]))) != 0;
        apply_mask(scores, rows + warp_row, key + column, ds);
      }
      exponentiate();
      make_operand();
      if (is_clamped) {
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
          const std::uint32_t (&a)[1][4] = reinterpret_cast<const std::uint32_t (&)[1][4]>(operand[step]);
          multiply_step<T, kHeadDim, kKeys, 1, true>(dq, a, k_tile, step);
        }
        fence_async_proxy();  // TMA will overwrite what all lanes have read here
        __syncwarp();
      } else {
        begin_dq(k_tile);
        wait_products<0>();
        pin(dq[0]);
      }
      release(k_empty, stage);
      key -= kKeys;
      if (key < tiles.first) break;
      begin_scores(key);
      wait_for_values();
      begin_gradients();
      wait_products<1>();
      pin(scores[0]);
    }
  }
  skip_tiles(all.first);

  const float unscale = forward.softmax_scale / scale;
  const float factor[1][2] = {{unscale, unscale}};
  const QueryBlock owned = QueryBlock::read(forward, plan);  // the same as `block`
  const Rows<T> dq_rows = rows_of<T>(params.dq, params.dq_stride, owned.batch, owned.head, forward.seqlen_q,
                                     forward.head_dim, plan.is_aligned16);
  synchronize_warpgroup<kDqConsumers>(group);  // its products have read q, in whose place the results pass
  store_rows<T, kHeadDim, kQueryRows>(dq_rows, owned.query + warp_row, dq, factor, q_tile, warp_row);
}

}  // namespace andromeda::cuda::hopper
