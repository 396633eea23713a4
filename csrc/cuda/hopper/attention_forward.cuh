// attention (docs/model.md#5) for many query rows, on wgmma and TMA (sm_90a). The meaning is that of
// attention/forward.cuh, which serves the other devices and the tensors that TMA cannot copy.
//
//   out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v
//
// One block per multiprocessor, which takes work items (a tile of queries of one head) from a common counter, longest
// first. Warpgroup 0 produces, the others consume, 64 query rows each:
//
//   producer     One warp takes items: it finds the keys that each row sees, and writes them into a slot. Another one
//                orders the copies of Q and of the tiles of K and V, from the last visible tile to the first. Slots and
//                stages are rings, so they are a few tiles ahead, and begin an item while the consumers finish one.
//   consumers    out += softmax weights times V, and the stores
//
//                                  head_dim              64           128           256
//   tile, queries x keys                          192 x 128     128 x 128      128 x 64
//   consumers                                             3             2             2
//   registers: out, scores, weights                32 64 32      64 64 32     128 32 16
//              Q (else in shared memory)                  -            32             -
//   shared memory, KiB: Q; K, V in two stages; out  24 64 24     32 128 16     64 128 16
//
// The loop of a consumer. The products are asynchronous: out += P V of a tile runs during the exponentials of the next.
//
//   S = bias of the next tile                          the accumulators start there
//   begin S += Q K^T of the next tile;  begin out += P V
//   wait for S;    S becomes weights, and their sum
//   wait for out;  P = S, rounded, and the sum of the rounded weights
//
// A tile with a mask is peeled from the loop: its exponentials do not run beside a product of this warpgroup. So is the
// first tile, and without a causal mask a tile with keys on both sides of the diagonal, where the bias has a kink. A
// warpgroup does not compute tiles that none of its own rows sees.
//
// Softmax: online, or bounded where the head's logits have a small bound (softmax.cuh). The output is divided by the
// sum of the weights as they were rounded, so that the rounding of a dominant weight cancels; softmax_lse uses the sum
// of the unrounded weights. A tensor core could add the rounded weights, as in attention/forward.cuh; but tensor cores
// are what this kernel waits for, and the two additions per score are hidden.
//
// Hidden values that are not finite: 0 * NaN is NaN. A tile of V with a mask is examined, and if it is not finite, its
// product is computed as in attention/forward.cuh, on mma.sync.
//
// Clocks of a multiprocessor for 128 x 128 pairs with 128 channels, without a mask, bounded, bfloat16: tensor cores
// 2048, exponentials 1024, shared memory 1056 (a product with A in registers reads 64 bytes a clock), instructions 942
// per scheduler where softmax_scale_log2 is 1, as with a q that contains it, and 128 more elsewhere.
//
// Not supported: float32 operands, head_dim above 256 or no multiple of 8, num_keys, dropout.
#pragma once

#include <cuda.h>

#include "attention/alibi.cuh"
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

template <int kHeadDim>
struct ForwardShape;

template <>
struct ForwardShape<64> {
  static constexpr int kConsumers = 3, kKeys = 128, kStages = 2;
  static constexpr int kProducerRegisters = 32, kConsumerRegisters = 160;
  static constexpr bool kQInRegisters = false;
};
template <>
struct ForwardShape<128> {
  static constexpr int kConsumers = 2, kKeys = 128, kStages = 2;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kQInRegisters = true;
};
template <>
struct ForwardShape<256> {
  static constexpr int kConsumers = 2, kKeys = 64, kStages = 2;
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
  static constexpr bool kQInRegisters = false;
};

template <int kHeadDim>
inline constexpr int kForwardQueries = ForwardShape<kHeadDim>::kConsumers * kWarpgroupRows;
template <int kHeadDim>
inline constexpr int kForwardThreads = (1 + ForwardShape<kHeadDim>::kConsumers) * kWarpgroupThreads;

// Of a block, in dynamic shared memory. Results pass through a panel of their own, so that the next Q may arrive.
template <int kHeadDim>
struct ForwardTiles {
  using Shape = ForwardShape<kHeadDim>;
  static constexpr int kQBytes = kTileBytes<kForwardQueries<kHeadDim>, kHeadDim>;
  static constexpr int kKeyBytes = kTileBytes<Shape::kKeys, kHeadDim>;
  static constexpr int kBytes =
      kQBytes + 2 * Shape::kStages * kKeyBytes + kTileBytes<kForwardQueries<kHeadDim>, kPanelWidth>;
  std::uint32_t q, first_k, first_v, out;

  __device__ explicit ForwardTiles(std::uint32_t start)
      : q(start),
        first_k(start + kQBytes),
        first_v(start + kQBytes + Shape::kStages * kKeyBytes),
        out(start + kQBytes + 2 * Shape::kStages * kKeyBytes) {}
  __device__ std::uint32_t k(int stage) const { return first_k + stage * kKeyBytes; }
  __device__ std::uint32_t v(int stage) const { return first_v + stage * kKeyBytes; }
};

struct ForwardPlan {
  float softmax_scale_log2;     // softmax_scale * log2(e)
  float inverse_softmax_scale;  // 1 / softmax_scale
  int query_tiles;              // per head
  int num_items;
  unsigned num_blocks;
  unsigned* counter;  // of the items taken beyond the first one of each block; zero before and after
  bool is_aligned16;  // out
};

// What the producer says about an item.
template <int kQueries>
struct ForwardItem {
  VisibleKeys rows[kQueries];
  KeyRange key_range[kQueries / kWarpgroupRows];  // of a warpgroup's rows
  bool is_bounded[kQueries / kWarpgroupRows];
  int batch, head, kv_head;
  int query;                  // the first one; -1: there is no further item
  int first_tile, last_tile;  // of keys, their first keys; no tile if first > last
  float raw_slope;            // slope / softmax_scale
};

inline constexpr int kForwardSlots = 2;

template <int kHeadDim>
struct ForwardShared {
  using Shape = ForwardShape<kHeadDim>;
  std::uint64_t q_full, q_empty;
  std::uint64_t k_full[Shape::kStages], k_empty[Shape::kStages];
  std::uint64_t v_full[Shape::kStages], v_empty[Shape::kStages];
  std::uint64_t item_full[kForwardSlots], item_empty[kForwardSlots];
  ForwardItem<kForwardQueries<kHeadDim>> items[kForwardSlots];
};

// Fills an item; by all lanes of one warp. The query tile is the slow index, the last one first: under a causal mask it
// sees most keys, and the items at the end of the launch are short. All heads, which share keys, run side by side, the
// last ones first: in this model family heads without a bias are last and have most to do.
template <typename T, int kKeys, int kQueries>
__device__ inline void describe_item(ForwardItem<kQueries>& item, const AttentionParams& params,
                                     const ForwardPlan& plan, unsigned index) {
  const auto lane = [] { return read_thread_index() & (kWarpLanes - 1); };  // the producer has few registers
  const int head_index = params.num_heads - 1 - static_cast<int>(index % params.num_heads);
  index /= params.num_heads;
  const int batch = static_cast<int>(index % params.batch);
  const int query = (plan.query_tiles - 1 - static_cast<int>(index / params.batch)) * kQueries;
  const Head head = describe_head(params, head_index);
  // Both decisions about the head in one register: the loops below have no more.
  int flags = (head.bound <= kMaxBound<T> ? 1 : 0) + (head.slope != 0.0f ? 2 : 0);
  asm volatile("" : "+r"(flags));
  if (lane() == 0) {
    item.batch = batch;
    item.head = head_index;
    item.kv_head = head_index / (params.num_heads / params.num_kv_heads);
    item.query = query;
    item.raw_slope = head.slope * plan.inverse_softmax_scale;
  }
#pragma unroll 1
  for (int group = 0; group < kQueries / kWarpgroupRows; ++group) {
    KeyRange key_range{kUnlimited, 0, 0, kUnlimited};
    bool all_see_themselves = true;  // a biased row that does not see its own key may have only tiny weights
#pragma unroll 1
    for (int row = group * kWarpgroupRows + lane(); row < (group + 1) * kWarpgroupRows; row += kWarpLanes) {
      const bool exists = query + row < params.seqlen_q;
      const Row own = describe_row(params, batch, query + row);
      item.rows[row] = {own.first, own.end};
      key_range = key_range.join(KeyRange::of(own, exists, head.window));
      all_see_themselves = all_see_themselves && (!exists || own.empty() || own.sees_itself());
    }
    key_range = key_range.of_warp();
    all_see_themselves = __all_sync(kWholeWarp, all_see_themselves);
    if (lane() == 0) {
      item.key_range[group] = key_range;
      item.is_bounded[group] = flags == 1 || (flags == 3 && all_see_themselves);
    }
  }
  if (lane() == 0) {
    int begin = kUnlimited, end = 0;
    for (const KeyRange& key_range : item.key_range) {
      begin = min(begin, key_range.begin);
      end = max(end, key_range.end);
    }
    item.first_tile = begin / kKeys * kKeys;
    item.last_tile = (end - 1) / kKeys * kKeys;
  }
}

// The first producing warp: takes items and describes them.
template <typename T, int kHeadDim>
__device__ inline void take_items(const AttentionParams& params, const ForwardPlan& plan,
                                  ForwardShared<kHeadDim>& shared) {
  const auto leads = [] { return (read_thread_index() & (kWarpLanes - 1)) == 0; };
  unsigned index = blockIdx.x;
#pragma unroll 1
  for (unsigned count = 0;; ++count) {
    static_assert(kForwardSlots == 2);
    const unsigned slot = count & 1;
    wait(shared_address(&shared.item_empty[slot]), (count >> 1 & 1) ^ 1);
    const bool exists = index < static_cast<unsigned>(plan.num_items);
    if (exists) {
      describe_item<T, ForwardShape<kHeadDim>::kKeys>(shared.items[slot], params, plan, index);
    } else if (leads()) {
      shared.items[slot].query = -1;
    }
    __syncwarp();  // the item is complete, and one lane arrives for all
    if (leads()) arrive(shared_address(&shared.item_full[slot]));
    if (!exists) return;
    if (leads()) index = plan.num_blocks + atomicInc(plan.counter, plan.num_items - 1);  // back to 0 with the last item
    index = __shfl_sync(kWholeWarp, index, 0);
  }
}

// The second producing warp, of which one lane is enough: orders the copies.
template <int kHeadDim>
__device__ inline void copy_items(const CUtensorMap* q_map, const CUtensorMap* k_map, const CUtensorMap* v_map,
                                  const ForwardTiles<kHeadDim>& tiles, ForwardShared<kHeadDim>& shared) {
  using Shape = ForwardShape<kHeadDim>;
  constexpr int kQueries = kForwardQueries<kHeadDim>, kKeys = Shape::kKeys;
  RingPlace<kForwardSlots> slot;
  RingPlace<Shape::kStages> place;
  std::uint32_t q_parity = 0;
  for (const CUtensorMap* map : {q_map, k_map, v_map}) prefetch_tensor_map(map);
#pragma unroll 1
  while (true) {
    wait(shared_address(&shared.item_full[slot.stage]), slot.parity);
    const auto& item = shared.items[slot.stage];
    const int query = item.query;
    if (query < 0) return;
    const int batch = item.batch, head = item.head, kv_head = item.kv_head;
    const int first_tile = item.first_tile;
    int key = item.last_tile;
    arrive(shared_address(&shared.item_empty[slot.stage]));
    slot.advance();
    if (first_tile <= key) {
      const std::uint32_t full = shared_address(&shared.q_full);
      wait(shared_address(&shared.q_empty), q_parity ^ 1);
      arrive_expect(full, ForwardTiles<kHeadDim>::kQBytes);
      copy_tile<kQueries, kHeadDim>(tiles.q, q_map, full, query, head, batch);
      q_parity ^= 1;
    }
#pragma unroll 1
    for (; key >= first_tile; key -= kKeys, place.advance()) {
      const auto copy = [&](std::uint64_t* full_stages, std::uint64_t* empty_stages, const CUtensorMap* map,
                            std::uint32_t tile) {
        const std::uint32_t full = shared_address(full_stages + place.stage);
        wait(shared_address(empty_stages + place.stage), place.parity ^ 1);
        arrive_expect(full, ForwardTiles<kHeadDim>::kKeyBytes);
        copy_tile<kKeys, kHeadDim>(tile, map, full, key, kv_head, batch);
      };
      copy(shared.k_full, shared.k_empty, k_map, tiles.k(place.stage));
      copy(shared.v_full, shared.v_empty, v_map, tiles.v(place.stage));
    }
  }
}

// S = the bias of the lane's rows, divided by softmax_scale: `slope` is so too, and negative right of the diagonal.
// Every accumulator has to be written anyway, so that rows r and r + 8 have a value each (compare seed_bias).
template <int kColumnTiles>
__device__ inline void seed_rows(float (&scores)[kColumnTiles][4], float slope, int position, int key) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float base = slope * static_cast<float>(key - (position + 8 * half));  // exact: computed in integers
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) scores[n][2 * half + i] = fmaf(slope, static_cast<float>(8 * n + i), base);
    }
  }
}

// The two numbers of a register of T. (Those of bfloat16 are the upper halves of floats, one instruction each.)
template <typename T>
__device__ inline float2 unpack(std::uint32_t bits) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xFFFF0000u));
  } else {
    Pair<T> pair;
    memcpy(&pair, &bits, sizeof pair);
    return to_floats(pair);
  }
}

// A consumer: one warpgroup.
template <typename T, int kHeadDim>
class ForwardConsumer {
  using Shape = ForwardShape<kHeadDim>;
  static constexpr int kKeys = Shape::kKeys, kQueries = kForwardQueries<kHeadDim>;
  static constexpr int kSteps = kKeys / 16;
  static constexpr int kOutTiles = kHeadDim < 128 ? kHeadDim / 8 : 16;  // columns of one product with V, in eights

 public:
  __device__ ForwardConsumer(const AttentionParams& params, const ForwardPlan& plan,
                             const ForwardTiles<kHeadDim>& tiles, ForwardShared<kHeadDim>& shared)
      : params_(params),
        plan_(plan),
        tiles_(tiles),
        shared_(shared),
        group_(uniform(threadIdx.x / kWarpgroupThreads) - 1) {}

  __device__ void run() {
#pragma unroll 1
    while (true) {
      wait(shared_address(&shared_.item_full[slot_.stage]), slot_.parity);
      item_ = &shared_.items[slot_.stage];
      query_ = uniform(item_->query);
      if (query_ < 0) return;
      begin();
      compute();
      store();  // in the end it waits for the lanes of the warp, which have read the item before
      release(shared_.item_empty, slot_);
    }
  }

 private:
  __device__ int lane() const { return read_thread_index() & (kWarpLanes - 1); }
  // The warp's first row of its group's rows and of the block's tile, and the lane's own first row and column of a
  // result (mma.cuh).
  __device__ int row_in_group() const { return (read_thread_index() & (kWarpgroupThreads - kWarpLanes)) >> 1; }
  __device__ int warp_row() const { return group_ * kWarpgroupRows + row_in_group(); }
  __device__ int row() const { return lane() >> 2; }
  __device__ int column() const { return (lane() & 3) << 1; }
  __device__ int first_position() const {
    return query_ + group_ * kWarpgroupRows + (params_.seqlen_k - params_.seqlen_q);
  }

  // The warp is done with the buffer at `place`; the next one is its own.
  template <int kStages>
  __device__ void release(std::uint64_t* empty, RingPlace<kStages>& place) {
    if (lane() == 0) arrive(shared_address(empty + place.stage));
    place.advance();
  }

  __device__ void begin() {
    key_range_.begin = uniform(item_->key_range[group_].begin);
    key_range_.end = uniform(item_->key_range[group_].end);
    key_range_.unmasked_begin = uniform(item_->key_range[group_].unmasked_begin);
    key_range_.unmasked_end = uniform(item_->key_range[group_].unmasked_end);
    raw_slope_ = item_->raw_slope;
    is_bounded_ = uniform(item_->is_bounded[group_]);
    scores_are_exponents_ = is_bounded_ && plan_.softmax_scale_log2 == 1.0f;
    softmax_.softmax_scale_log2 = plan_.softmax_scale_log2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      softmax_.row_max[0][half] = is_bounded_ ? 0.0f : -kInfinity;
      sum_[0][half] = rounded_sum_[0][half] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[0][n][i] = 0.0f;
    }
  }

  __device__ void compute() {
    const int first_tile = uniform(item_->first_tile), last_tile = uniform(item_->last_tile);
    if (first_tile > last_tile) return;
    wait(shared_address(&shared_.q_full), q_parity_);
    q_parity_ ^= 1;
    if constexpr (Shape::kQInRegisters) {
      load_q();
      __syncwarp();  // all lanes have read Q
      if (lane() == 0) arrive(shared_address(&shared_.q_empty));
    }
    bool pending = false;  // the product of weights_ with V
    int key = last_tile;
    const int own_first = max(first_tile, key_range_.begin / kKeys * kKeys);
#pragma unroll 1
    for (; key >= first_tile && !key_range_.touches(key, kKeys); key -= kKeys) skip();
#pragma unroll 1
    while (key >= own_first) {
      start(key, pending);
      pending = key_range_.is_unmasked(key, kKeys) || !add_not_finite_values(key);
      key -= kKeys;
      if (!pending || key < own_first || !is_plain(key)) continue;
      const int last = max(own_first, last_plain(key));
      const float slope = slope_at(key);
#pragma unroll 1
      do {
        step(key, slope);
      } while ((key -= kKeys) >= last);
    }
    if (pending) finish();
    if constexpr (!Shape::kQInRegisters) {
      if (lane() == 0) arrive(shared_address(&shared_.q_empty));
    }
#pragma unroll 1
    for (; key >= first_tile; key -= kKeys) skip();
  }

  __device__ void skip() {
    wait(shared_address(&shared_.k_full[k_.stage]), k_.parity);
    release(shared_.k_empty, k_);
    wait(shared_address(&shared_.v_full[v_.stage]), v_.parity);
    release(shared_.v_empty, v_);
  }

  // Whether a tile needs no correction after the product: no mask, and a bias that is linear in the key.
  __device__ bool is_plain(int key) const {
    return key_range_.is_unmasked(key, kKeys) &&
           (params_.causal || raw_slope_ == 0.0f || is_left(key) || is_right(key));
  }
  // The leftmost of the plain tiles from a plain one on. All have the same sign of the bias.
  __device__ int last_plain(int key) const {
    const int first = params_.causal || raw_slope_ == 0.0f || !is_right(key)
                          ? key_range_.unmasked_begin
                          : max(key_range_.unmasked_begin, first_position() + kWarpgroupRows - 1);
    return (first + kKeys - 1) & -kKeys;
  }
  // Of the bias: it grows with the key left of the diagonal, and falls right of it.
  __device__ float slope_at(int key) const { return !params_.causal && is_right(key) ? -raw_slope_ : raw_slope_; }
  __device__ bool is_left(int key) const { return key + kKeys <= first_position() + 1; }
  __device__ bool is_right(int key) const { return key >= first_position() + kWarpgroupRows - 1; }

  __device__ void load_q() {
    const std::uint32_t first = tiles_.q + vec_offset<kQueries>(warp_row() + (lane() & 15), lane() >> 4);
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      ldmatrix(q_[step], (first ^ ((step & 3) << 5)) + (step >> 2) * (kQueries * kPanelRowBytes));
    }
  }

  // S = bias + Q K^T, begun.
  __device__ void begin_scores(int key, float slope) {
    const int position = first_position() + row_in_group() + row();
    seed_rows(scores_[0], slope, position, key + column());
    pin(scores_[0]);
    wait(shared_address(&shared_.k_full[k_.stage]), k_.parity);
    fence_products();
#pragma unroll
    for (int at = 0; at < kHeadDim / 16; ++at) {
      const std::uint64_t keys = rows_descriptor<kKeys>(tiles_.k(k_.stage), 0, at);
      if constexpr (Shape::kQInRegisters) {
        multiply<T, false>(scores_[0], q_[at], keys);
      } else {
        multiply<T, false>(scores_[0], rows_descriptor<kQueries>(tiles_.q, group_ * kWarpgroupRows, at), keys);
      }
    }
  }

  // out += P V, begun.
  __device__ void begin_values() {
    wait(shared_address(&shared_.v_full[v_.stage]), v_.parity);
    fence_products();  // ptxas wants one before each batch
#pragma unroll
    for (int at = 0; at < kSteps; ++at) {
#pragma unroll
      for (int first = 0; first < kHeadDim / 8; first += kOutTiles) {
        multiply<T, true>(reinterpret_cast<float (&)[kOutTiles][4]>(out_[0][first]), weights_[at],
                          channels_descriptor<kKeys>(tiles_.v(v_.stage), at, first / 8));
      }
    }
  }

  __device__ void finish() {
    pin(weights_);
    pin(out_[0]);
    begin_values();
    commit_products();
    wait_products<0>();
    pin(out_[0]);
    release(shared_.v_empty, v_);
  }

  // S becomes weights; whether `out` has to be rescaled before the next product with V.
  __device__ bool exponentiate() {
    bool grew = false;
    if (!is_bounded_ && softmax_.update(scores_)) {
      grew = true;
      softmax_.rescale(sum_);
      softmax_.rescale(rounded_sum_);
    }
    // The sum of a tile is computed separately: a long row would lose the last bits of small addends.
    RowValues<1> tile_sum = {};
    if (scores_are_exponents_) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          scores_[0][n][i] = exp2_approx(scores_[0][n][i]);
          tile_sum[0][i / 2] += scores_[0][n][i];
        }
      }
    } else {
      softmax_.exponentiate(scores_, tile_sum);
    }
    add_to(sum_, tile_sum);
    return grew;
  }

  __device__ void round_weights() {
    RowValues<1> tile_sum = {};
#pragma unroll
    for (int at = 0; at < kSteps; ++at) {
      pack_operand<T>(weights_[at], scores_[0], at);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 rounded = unpack<T>(weights_[at][i]);
        tile_sum[0][i % 2] += rounded.x;
        tile_sum[0][i % 2] += rounded.y;
      }
    }
    add_to(rounded_sum_, tile_sum);
  }

  __device__ void step(int key, float slope) {
    pin(out_[0]);
    pin(weights_);
    begin_scores(key, slope);
    commit_products();
    begin_values();
    commit_products();
    wait_products<1>();
    pin(scores_[0]);
    release(shared_.k_empty, k_);
    const bool grew = exponentiate();
    wait_products<0>();
    pin(out_[0]);
    release(shared_.v_empty, v_);
    round_weights();
    if (grew) softmax_.rescale(out_);
  }

  // The first tile, and tiles with a mask. pending: the product of the tile before with V runs beside the scores. (Two
  // branches, each with its wait: ptxas does not follow products in flight through a branch.)
  __device__ void start(int key, bool pending) {
    if (pending) {
      pin(out_[0]);
      pin(weights_);
      begin_scores(key, slope_at(key));
      begin_values();
      commit_products();
      wait_products<0>();
      pin(out_[0]);
      release(shared_.v_empty, v_);
    } else {
      begin_scores(key, slope_at(key));
      commit_products();
      wait_products<0>();
    }
    pin(scores_[0]);
    release(shared_.k_empty, k_);
    if (!is_plain(key)) {
      const int at = warp_row();
      if (!params_.causal && !is_left(key) && !is_right(key)) {
        mirror_bias(scores_, raw_slope_, first_position() + row_in_group() + row(), key + column());
      }
      apply_mask(scores_, item_->rows + at, key + column());
    }
    if (exponentiate()) softmax_.rescale(out_);
    round_weights();
  }

  // If the tile of V is not finite: adds the product with it, and returns true.
  __device__ bool add_not_finite_values(int key) {
    wait(shared_address(&shared_.v_full[v_.stage]), v_.parity);
    const std::uint32_t tile = tiles_.v(v_.stage);
    constexpr int kQuarter = ForwardTiles<kHeadDim>::kKeyBytes / 4;
    const bool finite = is_finite<T, kQuarter>(tile + read_thread_index() % kWarpgroupThreads / kWarpLanes * kQuarter);
    if (!any_of_warpgroup<Shape::kConsumers>(group_, !finite)) return false;
#pragma unroll
    for (int at = 0; at < kSteps; ++at) {
      multiply_step<T, kHeadDim, kKeys, 1, true>(out_, reinterpret_cast<const std::uint32_t (&)[1][4]>(weights_[at]),
                                                 tile, at);
    }
    add_not_finite<T, kHeadDim, kKeys>(out_, item_->rows + warp_row(), key, tile);
    __syncwarp();
    release(shared_.v_empty, v_);
    return true;
  }

  __device__ void store() {
    const int batch = item_->batch, head = item_->head, first_query = query_ + warp_row();
    float factor[1][2];
    sum_over_group(sum_[0], 2);  // the four lanes of a row have different columns
    sum_over_group(rounded_sum_[0], 2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float divisor = rounded_sum_[0][half];
      factor[0][half] = divisor == 0.0f ? 0.0f : 1.0f / divisor;
      const int query = first_query + half * 8 + row();
      if (column() == 0 && query < params_.seqlen_q) {
        const float log2_sum = softmax_.exponent(0, half) + log2f(sum_[0][half]);  // -inf without a visible key
        const std::int64_t at = static_cast<std::int64_t>(batch) * params_.num_heads + head;
        params_.softmax_lse[at * params_.seqlen_q + query] = kLn2 * log2_sum;
      }
    }
    T* data = static_cast<T*>(params_.out) + batch * params_.out_stride.batch + head * params_.out_stride.head;
#pragma unroll
    for (int panel = 0; panel < kHeadDim / kPanelWidth; ++panel) {
      const Rows<T> target{data + panel * kPanelWidth, params_.out_stride.seq, params_.seqlen_q,
                           params_.head_dim - panel * kPanelWidth, plan_.is_aligned16};
      const auto& columns =
          reinterpret_cast<const float (&)[1][kPanelWidth / 8][4]>(out_[0][panel * (kPanelWidth / 8)]);
      store_rows<T, kPanelWidth, kQueries, 1>(target, first_query, columns, factor, tiles_.out, warp_row());
    }
  }

  const AttentionParams& params_;
  const ForwardPlan& plan_;
  const ForwardTiles<kHeadDim> tiles_;
  ForwardShared<kHeadDim>& shared_;
  const int group_;
  RingPlace<kForwardSlots> slot_;
  RingPlace<Shape::kStages> k_, v_;
  std::uint32_t q_parity_ = 0;

  // Of the current item.
  const ForwardItem<kQueries>* item_;
  int query_;
  KeyRange key_range_;
  float raw_slope_;
  bool is_bounded_;
  bool scores_are_exponents_;  // a weight is 2^score
  OnlineSoftmax<1, MaxUnit::kScore> softmax_;
  RowValues<1> sum_, rounded_sum_;
  float out_[1][kHeadDim / 8][4], scores_[1][kKeys / 8][4];
  std::uint32_t weights_[kSteps][4];
  std::uint32_t q_[Shape::kQInRegisters ? kHeadDim / 16 : 1][4];
};

template <typename T, int kHeadDim>
__global__ void __launch_bounds__(kForwardThreads<kHeadDim>, 1)
    attention_forward_wgmma_kernel(const AttentionParams params, const ForwardPlan plan,
                                   const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
                                   const __grid_constant__ CUtensorMap v_map) {
  using Shape = ForwardShape<kHeadDim>;
  extern __shared__ __align__(kTileAlignment) unsigned char memory[];
  __shared__ ForwardShared<kHeadDim> shared;
  const ForwardTiles<kHeadDim> tiles(shared_address(memory));
  if (threadIdx.x == 0) {
    constexpr int kConsumerWarps = Shape::kConsumers * (kWarpgroupThreads / kWarpLanes);
    init_mbarrier(shared_address(&shared.q_full), 1);
    init_mbarrier(shared_address(&shared.q_empty), kConsumerWarps);
    for (int i = 0; i < Shape::kStages; ++i) {
      init_mbarrier(shared_address(&shared.k_full[i]), 1);
      init_mbarrier(shared_address(&shared.k_empty[i]), kConsumerWarps);
      init_mbarrier(shared_address(&shared.v_full[i]), 1);
      init_mbarrier(shared_address(&shared.v_empty[i]), kConsumerWarps);
    }
    for (int i = 0; i < kForwardSlots; ++i) {
      init_mbarrier(shared_address(&shared.item_full[i]), 1);
      init_mbarrier(shared_address(&shared.item_empty[i]), kConsumerWarps + 1);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x < kWarpgroupThreads) {
    lower_registers<Shape::kProducerRegisters>();
    if (threadIdx.x < kWarpLanes) {
      take_items<T>(params, plan, shared);
    } else if (threadIdx.x == kWarpLanes) {
      copy_items(&q_map, &k_map, &v_map, tiles, shared);
    }
  } else {
    raise_registers<Shape::kConsumerRegisters>();
    ForwardConsumer<T, kHeadDim>(params, plan, tiles, shared).run();
  }
}

}  // namespace andromeda::cuda::hopper
