// token_shift_norm on the GPU (docs/model.md#3, #4, #7, #16.3): kernels. The launches are in token_shift_norm.cu.
//
//   u = alpha * residual_scale * residual + x                          u = x without a residual
//   y = (u - mean(u)) / sqrt(var(u) + 1e-5) * (1 + gamma)              y = u without gamma
//   shifted[t + delay(channel), channel] = y[t, channel]               delays are in andromeda/token_shift_norm.h
//
// A row of y goes to one row of `shifted` per segment: forward it is scattered to them, backward their gradients are
// gathered. So every row is normalised once, and no two rows write to the same place.
//
// A lane owns 16 channels of a row (8 in float32), in vectors of 16 bytes that lie side by side over the lanes of the
// row. These are 2^n lanes of a warp, or for rows above 512 channels several warps. dim 2560 in half precision:
//
//   channel   0 ... 7 | 8 ... 15 | ... | 1272 ... 1279 | 1280 ... 1287 | ... | 2552 ... 2559
//   lane         0    |    1     | ... |      159      |       0       | ... |      159         five warps, one block
//
// A block has as many rows at a time as fit into 256 lanes, and walks over a run of tokens. A row stays in registers
// from its one read to its results. A row above 8192 channels (5120 in float32) is cut into tiles: their statistics are
// merged, and all but the last are read again. Rows that are not aligned to 16 bytes are read element by element,
// adjacent ones by adjacent lanes. Where a segment ends inside a vector, only the shift of that vector goes element by
// element.
//
// Bytes of memory per element of x, s its size: forward 4 s (x, residual; y, shifted), backward 6 s (x, residual, dy,
// dshifted; dx, dresidual). gamma and residual_scale come from L1. Backward adds 8 bytes per channel and run for the
// partial sums, which lanes keep in registers while they walk the run.
//
// Backward, a row of one tile is prefetched to shared memory during the work on the previous row. Each lane copies the
// vectors that it will read to places of its own, 128 bytes, so that no barrier is needed.
//
// Blocks per multiprocessor at dim 2560, half precision: seven forward (56 registers), three backward (128), so that 60
// KB of loads and more can be in flight, where an H200 needs about 30 to be busy all the time. Without the prefetch the
// three blocks of the backward pass waited and computed in lockstep: 2.7 TB/s on an H200 instead of 3.4. A warp
// spends about 640 instructions on its 512 channels of a row forward and 1040 backward (counted along the sm_90a code,
// without key_start), where an H200 has time for 790 and 1180 while memory moves their bytes, and an H100 for 1130 and
// 1690. Float32: four and two blocks of ten warps.
//
// Not supported: float64. The binding has checked shapes; the .cu file checks the rest.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "andromeda/token_shift_norm.h"
#include "inverse_sqrt.cuh"
#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

// Channels of a row per lane: two vectors, or where every element has its own address, as many as registers permit.
template <typename T, Access kAccess>
inline constexpr int kLaneChannels = kAccess == Access::kVec16 ? 2 * kVec16Width<T> : 8;

// Longer rows are cut into tiles. The bound leaves a lane of the backward pass 128 registers, or 96 with fewer
// channels: its sums just fit.
template <typename T, Access kAccess>
inline constexpr int kMaxRowLanes = kLaneChannels<T, kAccess> == 16 ? 512 : 640;

inline constexpr int kMaxRowWarps = 20;
inline constexpr int kSharedRowLanes = 256;  // of the rows that share a block
inline constexpr float kLayerNormEpsilon = 1e-5f;

// Channel / width, and the delay: that number, but 0 for the channels after the last segment. The quotient of numbers
// below 2^31 is that of a product with ceil(2^(31 + bits) / width), where 2^bits >= width.
struct Segments {
  unsigned multiplier;
  int bits, shift;
  __device__ int segment(unsigned channel) const { return static_cast<int>(__umulhi(2 * channel, multiplier) >> bits); }
  __device__ int delay(unsigned channel) const { return segment(channel) <= shift ? segment(channel) : 0; }
};

struct Channels {
  float count, inverse_count;
};

// How blocks and lanes share the rows. Block i owns run i of the tokens, which are numbered through the batch.
struct RowPlan {
  std::int64_t num_tokens;   // batch * seqlen
  int num_runs, run_length;  // length in tokens; the last runs may be shorter or empty
  int num_groups;            // groups of lanes in a block, with a row each
  int num_lanes;             // of a group
  int warp_lanes_log2;       // of a group inside one warp
  int num_tiles;             // of a row
  int step_batch, step_seq;  // num_groups == step_batch * seqlen + step_seq
  Channels tile, last_tile, row;
  Segments segments;
};

// A group's place in its block, and among the tokens.
struct RowPlace {
  int group, num_tokens;  // of the run
  int token;              // the block's next, counted from the first of the run; the group's is `group` later
  unsigned batch, seq;    // coordinates of the group's next, unsigned because that makes cheaper products

  __device__ RowPlace(const RowPlan& plan, int seqlen) {
    group = static_cast<int>(threadIdx.x) / plan.num_lanes;
    token = 0;
    const std::int64_t first = static_cast<std::int64_t>(blockIdx.x) * plan.run_length;
    const std::int64_t left = plan.num_tokens - first;  // not positive for an empty run
    num_tokens = static_cast<int>(min(left, static_cast<std::int64_t>(plan.run_length)));
    const int divisor = max(seqlen, 1);  // without tokens gamma may still have a gradient, which is zero
    batch = static_cast<unsigned>((first + group) / divisor);
    seq = static_cast<unsigned>(first + group - static_cast<std::int64_t>(batch) * divisor);
  }

  __device__ bool inside() const { return token + group < num_tokens; }

  __device__ void next(const RowPlan& plan, unsigned seqlen) {
    token += plan.num_groups;
    batch += plan.step_batch;
    seq += plan.step_seq;
    if (seq >= seqlen) {
      seq -= seqlen;
      ++batch;
    }
  }

  template <typename T>
  __device__ T* row_of(T* tensor, const RowStrides& stride) const {
    return tensor + batch * stride.batch + seq * stride.seq;
  }
};

// The tensors that a backward pass reads a row of, in their order in shared memory.
enum class Operand { kX, kResidual, kDy, kDshifted };
inline constexpr int kOperands = 4;

// Dynamic shared memory of a backward pass, per lane: two vectors of each operand. The sums at the end need less.
template <Access kAccess>
inline constexpr int kStagedBytes = kAccess == Access::kVec16 ? kOperands * 2 * kVec16Bytes : 8 * sizeof(float);

// The unit of a lane's accesses: 16 bytes, or one element.
template <typename T, int kWidth>
struct Vec {
  static_assert(kWidth == 1 || kWidth == kVec16Width<T>);
  using Bits = std::conditional_t<kWidth == 1, T, uint4>;  // not halves, which nvcc would unpack too early
  Bits bits{};

  __device__ float as_float(int i) const {
    if constexpr (kWidth == 1) {
      return static_cast<float>(bits);
    } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // the upper half of a float: one instruction each
      unsigned words[kVec16Bytes / sizeof(unsigned)];
      memcpy(words, &bits, sizeof words);
      return __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    } else {
      Vec16<T> vec16;
      memcpy(&vec16, &bits, sizeof vec16);
      const float2 pair = to_floats(vec16.pairs[i / 2]);
      return i % 2 == 0 ? pair.x : pair.y;
    }
  }

  // Removes the first element; the others move up, and `last` comes at the end. A loop of these takes a vector apart
  // with little code, and keeps it in registers.
  __device__ T rotate(T last) {
    T first;
    if constexpr (kWidth == 1) {
      first = bits;
      bits = last;
    } else {
      constexpr int kElementBits = 8 * sizeof(T), kRest = 64 - kElementBits;
      std::uint64_t halves[2], end = 0;
      memcpy(halves, &bits, sizeof halves);
      memcpy(&first, &bits, sizeof first);
      memcpy(&end, &last, sizeof last);
      halves[0] = halves[0] >> kElementBits | halves[1] << kRest;
      halves[1] = halves[1] >> kElementBits | end << kRest;
      memcpy(&bits, halves, sizeof halves);
    }
    return first;
  }
};

// The data are used once: the caches evict them first.
template <int kWidth, typename T>
__device__ inline Vec<T, kWidth> load_vec(const T* source, bool inside) {
  Vec<T, kWidth> vec;
  if (inside) vec.bits = __ldcs(reinterpret_cast<const typename Vec<T, kWidth>::Bits*>(source));
  return vec;
}

template <typename T, int kWidth>
__device__ inline void store_vec(T* target, const Vec<T, kWidth>& vec) {
  *reinterpret_cast<typename Vec<T, kWidth>::Bits*>(target) = vec.bits;
}

template <typename T, int kWidth>
__device__ inline Vec<T, kWidth> rounded(const float* values) {
  Vec<T, kWidth> vec;
  if constexpr (kWidth == 1) {
    vec.bits = T(values[0]);
  } else {
    Vec16<T> vec16;
#pragma unroll
    for (int i = 0; i < Vec16<T>::kPairs; ++i) {
      vec16.pairs[i] = from_floats<T>(make_float2(values[2 * i], values[2 * i + 1]));
    }
    memcpy(&vec.bits, &vec16, sizeof vec16);
  }
  return vec;
}

// Constants that all rows share, through the read-only path; zeros where not inside.
template <int kWidth>
__device__ inline void load_constants(float* values, const float* source, bool inside) {
  if constexpr (kWidth == 1) {
    values[0] = inside ? __ldg(source) : 0.0f;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      float4 four{};
      if (inside) four = __ldg(reinterpret_cast<const float4*>(source + i));
      memcpy(values + i, &four, sizeof four);
    }
  }
}

template <int kWidth>
__device__ inline void load_floats(float* values, const float* source) {
  if constexpr (kWidth == 1) {
    values[0] = *source;
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(source + i);
      memcpy(values + i, &four, sizeof four);
    }
  }
}

template <int kWidth>
__device__ inline void store_floats(float* target, const float* values) {
  if constexpr (kWidth == 1) {
    *target = values[0];
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i += 4) {
      float4 four;
      memcpy(&four, values + i, sizeof four);
      *reinterpret_cast<float4*>(target + i) = four;
    }
  }
}

// Whether the row `delay` tokens before row `seq` of a batch entry belongs to another document or to padding. The row
// must exist.
__device__ inline bool is_hidden(const TokenShiftNormParams& params, unsigned batch, unsigned seq, int delay) {
  if (params.key_start == nullptr) return false;
  const std::int32_t* start = params.key_start + static_cast<std::int64_t>(batch) * params.seqlen + seq;
  return params.position + seq - delay < __ldg(start);
}

// Whether the sequence has a row `delay` tokens after the group's.
__device__ inline bool has_later(const TokenShiftNormParams& params, const RowPlace& place, int delay) {
  return static_cast<unsigned>(delay) < params.seqlen - place.seq;
}

// Whether the group's row is shifted to the row `delay` tokens later.
__device__ inline bool reaches_later(const TokenShiftNormParams& params, const RowPlace& place, int delay) {
  return has_later(params, place, delay) && !is_hidden(params, place.batch, place.seq + delay, delay);
}

// Scatters y of the group's row to the row of `shifted` that is `delay` tokens later. Where the group's own row of
// `shifted` takes its values from before this call, writes them too: no other row does. own: a place in that row.
template <typename T, int kWidth>
__device__ inline void scatter(const TokenShiftNormParams& params, const RowPlace& place, T* own, unsigned channel,
                               int delay, const Vec<T, kWidth>& y) {
  if (has_later(params, place, delay)) {
    T* later = own + delay * params.shifted_stride.seq;
    if (is_hidden(params, place.batch, place.seq + delay, delay)) {
      store_vec(later, Vec<T, kWidth>{});
    } else {
      store_vec(later, y);
    }
  }
  if (place.seq < static_cast<unsigned>(delay)) {
    const bool known = params.history != nullptr && !is_hidden(params, place.batch, place.seq, delay);
    const T* before = static_cast<const T*>(params.history) + place.batch * params.history_stride.batch +
                      (params.shift - (delay - place.seq)) * params.history_stride.seq + channel;
    store_vec(own, load_vec<kWidth>(before, known));
  }
}

// Two buffers, used alternately: the barrier of one lies between two uses of the other, so each use needs one barrier.
struct WarpSums {
  float4 values[2][kMaxRowWarps];
};

// The sums that layer norm needs of a row, or of a part of it.
struct Statistics {
  float count, mean;
  float squares;     // sum of (u - mean)^2
  float e, product;  // backward: sums of e = g * (1 + gamma), and of e * (u - mean)

  // Tile 0 is the start. With each later tile, sums about two means become sums about the common one.
  __device__ void merge(const Statistics& other, int tile) {
    if (tile == 0) {
      *this = other;
      return;
    }
    const float total = count + other.count, distance = other.mean - mean, weight = other.count / total;
    squares += other.squares + distance * distance * count * weight;
    product += other.product - distance * weight * e + distance * (1.0f - weight) * other.e;
    e += other.e;
    mean += distance * weight;
    count = total;
  }
};

// A lane of a group: the channels that it owns, and its work on them.
template <typename T, Access kAccess>
struct RowLane {
  static constexpr int kWidth = kAccess == Access::kVec16 ? kVec16Width<T> : 1;
  static constexpr int kChannels = kLaneChannels<T, kAccess>;
  static constexpr int kVecs = kChannels / kWidth;
  static_assert(kWidth == 1 || kWidth % 4 == 0, "a vector of x must read whole vectors of gamma");
  static_assert(kMaxRowLanes<T, kAccess> <= kMaxRowWarps * kWarpLanes);
  using Vecs = Vec<T, kWidth>[kVecs];

  const RowPlan& plan;
  RowPlace& place;
  WarpSums& warp_sums;
  unsigned dim;
  int lane;

  __device__ RowLane(const RowPlan& plan, RowPlace& place, WarpSums& warp_sums, int dim)
      : plan(plan), place(place), warp_sums(warp_sums), dim(dim) {
    lane = static_cast<int>(threadIdx.x) - place.group * plan.num_lanes;
  }

  // From here on everything that depends on these numbers, above all addresses, is computed again, which is cheaper
  // than keeping it.
  __device__ void forget() { asm volatile("" : "+r"(lane), "+r"(place.batch), "+r"(place.seq)); }

  // The first channel of a vector. It is below dim + 8192, which may not fit an int.
  __device__ unsigned channel(int tile, int vec) const {
    return (static_cast<unsigned>(tile * kVecs + vec) * plan.num_lanes + lane) * kWidth;
  }

  // Zeros without a tensor. Missing vectors are predicated off: a branch between loads would make the first ones arrive
  // before the others are issued.
  __device__ void load_row(Vecs& vecs, const void* tensor, const RowStrides& stride, int tile) const {
    const bool inside = place.inside() && tensor != nullptr;
    const T* row = place.row_of(static_cast<const T*>(tensor), stride);
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(tile, vec);
      vecs[vec] = load_vec<kWidth>(row + first, inside && first < dim);
    }
  }

  // Zeros where there is no vector, or no channel.
  __device__ void load_vector(float (&values)[kChannels], const float* vector, int tile) const {
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(tile, vec);
      load_constants<kWidth>(values + vec * kWidth, vector + first, vector != nullptr && first < dim);
    }
  }

  // du / dresidual.
  __device__ void load_factor(float (&factor)[kChannels], const TokenShiftNormParams& params, int tile) const {
    load_vector(factor, params.residual_scale, tile);
    const float without_scale = params.residual_scale == nullptr ? params.alpha : 0.0f;
#pragma unroll
    for (float& value : factor) value = fmaf(value, params.alpha, without_scale);
  }

  // u, and the residual as stored; zeros in channels that do not exist.
  __device__ void load_input(float (&u)[kChannels], Vecs& residual, const TokenShiftNormParams& params,
                             int tile) const {
    Vecs x;
    load_row(x, params.x, params.x_stride, tile);
    load_row(residual, params.residual, params.residual_stride, tile);
    add_residual(u, x, residual, params, tile);
  }

  // Likewise, and the gradient of y from both results.
  __device__ void load_input(float (&u)[kChannels], float (&g)[kChannels], Vecs& residual,
                             const TokenShiftNormBackwardParams& params, int tile) const {
    Vecs x, dy, dshifted;
    load_row(x, params.forward.x, params.forward.x_stride, tile);
    load_row(residual, params.forward.residual, params.forward.residual_stride, tile);
    load_row(dy, params.dy, params.dy_stride, tile);
    gather(dshifted, params, tile);
    add_residual(u, x, residual, params.forward, tile);
    gather_mixed(dshifted, params, tile);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) g[i] = element(dy, i) + element(dshifted, i);
  }

  // The same of a prefetched row; then prefetches the row after it, during the work on this one. A lane copies and
  // reads places of its own, so that no barrier is needed.
  __device__ void take_prefetched_input(float (&u)[kChannels], float (&g)[kChannels], Vecs& residual,
                                        unsigned char* staged, const TokenShiftNormBackwardParams& params) const {
    cp_async_wait<0>();
    Vecs x, dy, dshifted;
    take_prefetched_row(x, staged, Operand::kX);
    take_prefetched_row(residual, staged, Operand::kResidual);
    take_prefetched_row(dy, staged, Operand::kDy);
    take_prefetched_row(dshifted, staged, Operand::kDshifted);
    add_residual(u, x, residual, params.forward, 0);
    gather_mixed(dshifted, params, 0);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) g[i] = element(dy, i) + element(dshifted, i);
    RowPlace next_place = place;
    next_place.next(plan, params.forward.seqlen);
    prefetch_input(staged, params, next_place);
  }

  // Begins to copy the row at `at`, of one tile, of all operands of a backward pass; zeros where there is nothing.
  __device__ void prefetch_input(unsigned char* staged, const TokenShiftNormBackwardParams& params,
                                 const RowPlace& at) const {
    prefetch_row(staged, Operand::kX, params.forward.x, params.forward.x_stride, at);
    prefetch_row(staged, Operand::kResidual, params.forward.residual, params.forward.residual_stride, at);
    prefetch_row(staged, Operand::kDy, params.dy, params.dy_stride, at);
    const T* own = at.row_of(static_cast<const T*>(params.dshifted), params.dshifted_stride);
    const bool inside = at.inside() && params.dshifted != nullptr;
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(0, vec);
      const int delay = plan.segments.delay(first);
      const bool whole = inside && first < dim && !is_mixed(first);
      const bool exists = whole && reaches_later(params.forward, at, delay);
      cp_async(place_of(staged, Operand::kDshifted, vec), own + delay * params.dshifted_stride.seq + first,
               exists ? kVec16Bytes : 0);
    }
    cp_async_commit();
  }

  __device__ void prefetch_row(unsigned char* staged, Operand operand, const void* tensor, const RowStrides& stride,
                               const RowPlace& at) const {
    const bool inside = at.inside() && tensor != nullptr;
    const T* row = at.row_of(static_cast<const T*>(tensor), stride);
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(0, vec);
      cp_async(place_of(staged, operand, vec), row + first, inside && first < dim ? kVec16Bytes : 0);
    }
  }

  __device__ void take_prefetched_row(Vecs& vecs, const unsigned char* staged, Operand operand) const {
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      vecs[vec].bits = *reinterpret_cast<const uint4*>(staged + offset_of(operand, vec));
    }
  }

  __device__ static unsigned offset_of(Operand operand, int vec) {
    return ((static_cast<int>(operand) * kVecs + vec) * blockDim.x + threadIdx.x) * kVec16Bytes;
  }

  __device__ static std::uint32_t place_of(unsigned char* staged, Operand operand, int vec) {
    return shared_address(staged) + offset_of(operand, vec);
  }

  __device__ void add_residual(float (&u)[kChannels], const Vecs& x, const Vecs& residual,
                               const TokenShiftNormParams& params, int tile) const {
    float factor[kChannels];
    load_factor(factor, params, tile);
#pragma unroll
    for (int i = 0; i < kChannels; ++i) u[i] = fmaf(factor[i], element(residual, i), element(x, i));
  }

  // Whether one segment ends inside a vector and another begins.
  __device__ bool is_mixed(unsigned first) const {
    return kWidth > 1 && plan.segments.segment(first) != plan.segments.segment(first + kWidth - 1);
  }

  // Gathers the gradients of the rows of `shifted` that the group's row was scattered to.
  __device__ void gather(Vecs& vecs, const TokenShiftNormBackwardParams& params, int tile) const {
    const T* own = place.row_of(static_cast<const T*>(params.dshifted), params.dshifted_stride);
    const bool inside = place.inside() && params.dshifted != nullptr;
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(tile, vec);
      const int delay = plan.segments.delay(first);
      const T* source = own + delay * params.dshifted_stride.seq + first;
      const bool whole = inside && first < dim && !is_mixed(first);
      vecs[vec] = load_vec<kWidth>(source, whole && reaches_later(params.forward, place, delay));
    }
  }

  // The vectors that `gather` left out. Their loads wait for each other, so they come after all others.
  __device__ void gather_mixed(Vecs& vecs, const TokenShiftNormBackwardParams& params, int tile) const {
    const T* own = place.row_of(static_cast<const T*>(params.dshifted), params.dshifted_stride);
    const bool inside = place.inside() && params.dshifted != nullptr;
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(tile, vec);
      if (!inside || first >= dim || !is_mixed(first)) continue;
#pragma unroll 1
      for (unsigned one = first; one < first + kWidth; ++one) {
        const int delay = plan.segments.delay(one);
        const T* source = own + delay * params.dshifted_stride.seq + one;
        vecs[vec].rotate(load_vec<1>(source, reaches_later(params.forward, place, delay)).bits);
      }
    }
  }

  __device__ void store_row(void* tensor, const RowStrides& stride, const float (&values)[kChannels], int tile) const {
    T* row = place.row_of(static_cast<T*>(tensor), stride);
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(tile, vec);
      if (first < dim) store_vec(row + first, rounded<T, kWidth>(values + vec * kWidth));
    }
  }

  // y and `shifted`, from the same rounded values.
  __device__ void store_outputs(const TokenShiftNormParams& params, const float (&values)[kChannels], int tile) const {
    T* y_row = place.row_of(static_cast<T*>(params.y), params.y_stride);
    T* shifted_row = place.row_of(static_cast<T*>(params.shifted), params.shifted_stride);
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      const unsigned first = channel(tile, vec);
      if (first >= dim) continue;
      Vec<T, kWidth> y = rounded<T, kWidth>(values + vec * kWidth);
      if (params.y != nullptr) store_vec(y_row + first, y);
      if (params.shifted == nullptr) continue;
      if (!is_mixed(first)) {
        scatter(params, place, shifted_row + first, first, plan.segments.delay(first), y);
      } else {
#pragma unroll 1
        for (unsigned one = first; one < first + kWidth; ++one) {
          scatter(params, place, shifted_row + one, one, plan.segments.delay(one), Vec<T, 1>{y.rotate(T(0.0f))});
        }
      }
    }
  }

  // Replaces each value by its sum over the lanes of the row, the same bits in all of them.
  // buffer: where the sums of the warps meet; 0 and 1 alternately.
  template <int kCount>
  __device__ void sum_over_row(float (&values)[kCount], int buffer) const {
    if (plan.num_lanes < kWarpLanes) return sum_over_group(values, plan.warp_lanes_log2);
    sum_over_warp(values);
    if (plan.num_lanes == kWarpLanes) return;
    const int num_warps = plan.num_lanes / kWarpLanes;
    float4* sums = warp_sums.values[buffer] + place.group * num_warps;
    static_assert(kCount <= 4);
    if (lane % kWarpLanes == 0) {
      float4 own{};
      memcpy(&own, values, sizeof values);
      sums[lane / kWarpLanes] = own;
    }
    // The sums of all warps of the block are complete. Only those of the row's warps are needed, but a barrier for each
    // row would have a computed number, and a kernel that computes one occupies all 16 barriers, which limits a
    // multiprocessor of Hopper to four blocks.
    __syncthreads();
    // A lane fetches the sums of one warp, and all add them up: fewer instructions than a loop in every lane.
    float of_warp[4] = {};
    static_assert(kMaxRowWarps <= kWarpLanes);
    if (lane % kWarpLanes < num_warps) memcpy(of_warp, &sums[lane % kWarpLanes], sizeof of_warp);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = of_warp[i];
    sum_over_warp(values);
  }

  // Subtracts the mean of a tile from it and returns its sums. e: for the backward pass, else nullptr.
  template <typename E>
  __device__ Statistics centre(float (&u)[kChannels], const E& e, int tile) {
    constexpr bool kGradient = !std::is_same_v<E, std::nullptr_t>;
    const Channels& channels = tile == plan.num_tiles - 1 ? plan.last_tile : plan.tile;
    Statistics result{};
    result.count = channels.count;
    float sum[1] = {};
#pragma unroll
    for (int i = 0; i < kChannels; ++i) sum[0] += u[i];
    sum_over_row(sum, 0);
    // A quotient: a product with 1 / count, and the correction of its remainder.
    result.mean = sum[0] * channels.inverse_count;
    result.mean = fmaf(fmaf(-result.mean, result.count, sum[0]), channels.inverse_count, result.mean);

    float sums[kGradient ? 3 : 1] = {};
#pragma unroll
    for (int vec = 0; vec < kVecs; ++vec) {
      if (channel(tile, vec) >= dim) continue;
#pragma unroll
      for (int i = vec * kWidth; i < (vec + 1) * kWidth; ++i) {
        u[i] -= result.mean;
        sums[0] = fmaf(u[i], u[i], sums[0]);
        if constexpr (kGradient) {
          sums[1] += e[i];
          sums[2] = fmaf(e[i], u[i], sums[2]);
        }
      }
    }
    sum_over_row(sums, 1);
    result.squares = sums[0];
    if constexpr (kGradient) {
      result.e = sums[1];
      result.product = sums[2];
    }
    return result;
  }

  // Channel i of the lane.
  __device__ static float element(const Vecs& vecs, int i) { return vecs[i / kWidth].as_float(i % kWidth); }
};

template <int kCount>
__device__ inline void subtract(float (&values)[kCount], float number) {
#pragma unroll
  for (float& value : values) value -= number;
}

template <typename T, Access kAccess>
__global__ void __launch_bounds__(kMaxRowLanes<T, kAccess>, kAccess == Access::kVec16 ? 2 : 1)
    token_shift_norm_forward_kernel(const __grid_constant__ TokenShiftNormParams params,
                                    const __grid_constant__ RowPlan plan) {
  using Lane = RowLane<T, kAccess>;
  __shared__ WarpSums warp_sums;
  RowPlace place(plan, params.seqlen);
  Lane lane(plan, place, warp_sums, params.dim);
  const bool norm = params.gamma != nullptr;

  // The trip count is that of the whole block, for its barriers, and because shuffles need whole warps.
  while (place.token < place.num_tokens) {
    // Step 1: read the row. Of several tiles the last one stays in registers.
    const int last = plan.num_tiles - 1;
    float u[Lane::kChannels];
    typename Lane::Vecs residual;
    Statistics statistics{};
    float centre = 0.0f;  // that was subtracted from u
    int tile = norm ? 0 : last;
    while (true) {
      lane.forget();
      lane.load_input(u, residual, params, tile);
      if (norm) {
        const Statistics part = lane.centre(u, nullptr, tile);
        centre = part.mean;
        statistics.merge(part, tile);
      }
      if (tile == last) break;
      ++tile;
    }
    const float inverse = inverse_sqrt<T>(fmaf(statistics.squares, plan.row.inverse_count, kLayerNormEpsilon));

    // Step 2: normalise, write.
    while (true) {
      lane.forget();
      if (norm) {
        const float offset = (centre - statistics.mean) * inverse;
        float gamma[Lane::kChannels];
        lane.load_vector(gamma, params.gamma, tile);
#pragma unroll
        for (int i = 0; i < Lane::kChannels; ++i) {
          const float u_hat = fmaf(u[i], inverse, offset);
          u[i] = fmaf(u_hat, gamma[i], u_hat);
        }
      }
      if (place.inside()) lane.store_outputs(params, u, tile);
      if (--tile < 0) break;
      lane.load_input(u, residual, params, tile);
      subtract(u, centre = statistics.mean);
    }
    place.next(plan, params.seqlen);
  }
}

// A vector's gradient, summed over the tokens of a run: in registers, or for rows of several tiles in the result
// itself.
template <typename Lane>
struct RunSum {
  static constexpr int kWidth = Lane::kWidth, kChannels = Lane::kChannels;
  float sums[kChannels] = {};
  float* run;    // (dim,), or nullptr
  float factor;  // of the result

  __device__ RunSum(float* partial, float factor, const Lane& lane)
      : run(partial == nullptr ? nullptr : partial + static_cast<std::int64_t>(blockIdx.x) * lane.dim), factor(factor) {
    if (run == nullptr || lane.plan.num_tiles == 1) return;
    for (int tile = 0; tile < lane.plan.num_tiles; ++tile) write(sums, lane, tile);
  }

  // Adds a * b.
  __device__ void add(const float (&a)[kChannels], const float (&b)[kChannels], const Lane& lane, int tile) {
    if (lane.plan.num_tiles == 1) {
#pragma unroll
      for (int i = 0; i < kChannels; ++i) sums[i] = fmaf(a[i], b[i], sums[i]);
      return;
    }
    if (run == nullptr) return;
    float total[kChannels] = {};
#pragma unroll
    for (int vec = 0; vec < Lane::kVecs; ++vec) {
      const unsigned channel = lane.channel(tile, vec);
      if (channel < lane.dim) load_floats<kWidth>(total + vec * kWidth, run + channel);
    }
#pragma unroll
    for (int i = 0; i < kChannels; ++i) total[i] = fmaf(a[i] * b[i], factor, total[i]);
    write(total, lane, tile);
  }

  __device__ void write(const float (&values)[kChannels], const Lane& lane, int tile) const {
#pragma unroll
    for (int vec = 0; vec < Lane::kVecs; ++vec) {
      const unsigned channel = lane.channel(tile, vec);
      if (channel < lane.dim) store_floats<kWidth>(run + channel, values + vec * kWidth);
    }
  }

  // Adds the groups of the block in order. group_sums: room for kSharedRowLanes * kChannels.
  __device__ void finish(const Lane& lane, float* group_sums) {
    if (run == nullptr || lane.plan.num_tiles > 1) return;
#pragma unroll
    for (float& sum : sums) sum *= factor;
    if (lane.plan.num_groups == 1) return write(sums, lane, 0);
    const int padded_dim = lane.plan.num_lanes * kChannels;
#pragma unroll
    for (int vec = 0; vec < Lane::kVecs; ++vec) {
      store_floats<kWidth>(group_sums + lane.place.group * padded_dim + lane.channel(0, vec), sums + vec * kWidth);
    }
    __syncthreads();  // the sums of all groups are complete
    for (unsigned channel = threadIdx.x; channel < lane.dim; channel += blockDim.x) {
      float sum = 0.0f;
      for (int group = 0; group < lane.plan.num_groups; ++group) sum += group_sums[group * padded_dim + channel];
      run[channel] = sum;
    }
  }
};

// With g the gradient of y from both results, e = g * (1 + gamma) and u_hat the normalised input:
//   du = (e - mean(e) - u_hat * mean(e * u_hat)) * inverse      dgamma = sum of g * u_hat over tokens
//   dx = du      dresidual = factor * du                        dresidual_scale = sum of alpha * residual * du
template <typename T, Access kAccess>
__global__ void __launch_bounds__(kMaxRowLanes<T, kAccess>)
    token_shift_norm_backward_kernel(const __grid_constant__ TokenShiftNormBackwardParams params,
                                     const __grid_constant__ RowPlan plan) {
  using Lane = RowLane<T, kAccess>;
  __shared__ WarpSums warp_sums;
  extern __shared__ __align__(kVec16Bytes) unsigned char staged[];
  const TokenShiftNormParams& forward = params.forward;
  RowPlace place(plan, forward.seqlen);
  Lane lane(plan, place, warp_sums, forward.dim);
  RunSum<Lane> dresidual_scale(params.dresidual_scale_partial, forward.alpha, lane);
  RunSum<Lane> dgamma(params.dgamma_partial, 1.0f, lane);
  const bool norm = forward.gamma != nullptr;
  constexpr bool kStaged = kAccess == Access::kVec16;
  if constexpr (kStaged) {
    if (plan.num_tiles == 1) lane.prefetch_input(staged, params, place);
  }

  // The trip count is that of the whole block, for its barriers, and because shuffles need whole warps.
  while (place.token < place.num_tokens) {
    // Step 1: read the row. Of several tiles the last one stays in registers.
    const int last = plan.num_tiles - 1;
    float u[Lane::kChannels], g[Lane::kChannels];
    typename Lane::Vecs residual;
    Statistics statistics{};
    float centre = 0.0f;  // that was subtracted from u
    int tile = norm ? 0 : last;
    while (true) {
      lane.forget();
      if (kStaged && plan.num_tiles == 1) {
        if constexpr (kStaged) lane.take_prefetched_input(u, g, residual, staged, params);
      } else {
        lane.load_input(u, g, residual, params, tile);
      }
      if (norm) {
        float e[Lane::kChannels];
        lane.load_vector(e, forward.gamma, tile);
#pragma unroll
        for (int i = 0; i < Lane::kChannels; ++i) e[i] = fmaf(g[i], e[i], g[i]);
        const Statistics part = lane.centre(u, e, tile);
        centre = part.mean;
        statistics.merge(part, tile);
      }
      if (tile == last) break;
      ++tile;
    }
    // With float32 accuracy for dgamma, whatever T is.
    const float inverse = inverse_sqrt<float>(fmaf(statistics.squares, plan.row.inverse_count, kLayerNormEpsilon));
    const float from_e = -statistics.e * plan.row.inverse_count * inverse;
    const float from_u_hat = -statistics.product * plan.row.inverse_count * inverse * inverse;
    // A row whose g is 0, padding for instance, adds nothing to any sum, even where it holds a NaN (0 * NaN).
    const bool may_be_unused = norm && statistics.e == 0.0f && isnan(statistics.product);

    // Step 2: the gradients.
    while (true) {
      lane.forget();
      bool unused = may_be_unused;
      if (may_be_unused) {
#pragma unroll
        for (int i = 0; i < Lane::kChannels; ++i) unused = unused && g[i] == 0.0f;
      }
      if (norm && !unused) {
        const float offset = (centre - statistics.mean) * inverse;
        float gamma[Lane::kChannels];
        lane.load_vector(gamma, forward.gamma, tile);
#pragma unroll
        for (int i = 0; i < Lane::kChannels; ++i) u[i] = fmaf(u[i], inverse, offset);
        dgamma.add(g, u, lane, tile);
#pragma unroll
        for (int i = 0; i < Lane::kChannels; ++i) {
          const float e = fmaf(g[i], gamma[i], g[i]);
          g[i] = fmaf(e, inverse, fmaf(u[i], from_u_hat, from_e));
        }
      }
      if (place.inside()) lane.store_row(params.dx, params.dx_stride, g, tile);
      if (forward.residual != nullptr) {
#pragma unroll
        for (int i = 0; i < Lane::kChannels; ++i) u[i] = Lane::element(residual, i);
        if (!norm || unused) {
#pragma unroll
          for (int i = 0; i < Lane::kChannels; ++i) u[i] = g[i] == 0.0f ? 0.0f : u[i];
        }
        dresidual_scale.add(u, g, lane, tile);
        lane.load_factor(u, forward, tile);
#pragma unroll
        for (int i = 0; i < Lane::kChannels; ++i) u[i] *= g[i];
        if (place.inside()) lane.store_row(params.dresidual, params.dresidual_stride, u, tile);
      }
      if (--tile < 0) break;
      lane.load_input(u, g, residual, params, tile);
      subtract(u, centre = statistics.mean);
    }
    place.next(plan, forward.seqlen);
  }

  auto* group_sums = reinterpret_cast<float*>(staged);
  if constexpr (kStaged) {
    cp_async_wait<0>();                        // the last prefetch reads nothing, but writes zeros
    if (plan.num_groups > 1) __syncthreads();  // all lanes have read their prefetched rows
  }
  dgamma.finish(lane, group_sums);
  if (plan.num_groups > 1) __syncthreads();  // the sums are added up: their place is free
  dresidual_scale.finish(lane, group_sums);
}

}  // namespace andromeda::cuda
