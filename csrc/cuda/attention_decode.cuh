// attention (docs/model.md#5) for few query rows and many keys: decoding, short continuations.
//
//   out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v
//
// All query heads of a key head and all tokens are packed into the rows of one tile (row = token * group + head), so
// that a key is read once for all of them. A block owns 16 or 32 rows of one (batch, key head) and a share of the keys;
// its warps take slices of 16 keys in turn, each with a maximum, sum and output of its own:
//
//              steps of 64 keys, num_shares runs of them
//             +----+----+----+----+----+----+----+----+--
//   16 or 32  |w0  | w1 | w2 | w3 |w0  | w1 | w2 | w3 |       S = q k^T    rows x 16
//     rows    |    |    |    |    |    |    |    |    |       out += P v   rows x head_dim, registers
//             +----+----+----+----+----+----+----+----+--
//
// A slice's keys and values travel through a ring that belongs to the warp: no barrier of the block in the loop, and as
// soon as the keys of a slice have been multiplied their place takes those of the slice kStages ahead.
//
//   shared memory, head_dim 128     queries 8 KiB, ring 4 warps x 2 stages x (4 KiB keys + 4 KiB values) = 64 KiB
//   head_dim 64                     queries 4 KiB, ring 4 warps x 4 stages x (2 KiB keys + 2 KiB values) = 64 KiB
//   registers, 32 rows, 128 wide    out 128, scores 16, their maxima, sums, slopes and positions 4 each
//
// 32 FLOP for each byte that is read: a fifth of what the tensor cores can do meanwhile. What counts is bytes in
// flight, latency times bandwidth: 24 KiB per SM (docs/attention.md#decoding). A block has 48 to 64 KiB on the way, and
// two blocks fit on an SM of 8.0 and 9.0, one where shared memory ends at 100 KiB.
//
// The end. The four warps add their outputs through shared memory. With more than one share the block writes the sums
// to the workspace and draws a semaphore; of a group of shares the last to arrive adds them, always in the order of their
// numbers, so that a result does not depend on timing. The groups' sums are added in the same way, until one is left:
//
//   128 shares of 24 rows     0 ... 5  | 6 ... 11 | ... |  126 127          the last of each group of 6
//   22 sums                      0 ... 5     | 6 ... 11 | ... | 18 ... 21   the last of each group of 6
//   4 sums                                   0 ... 3                        the last of all, which writes the rows
//
// All that a block adds is on its way at once: the others' results go into the tiles' place in shared memory, past the
// registers, and its own stays in registers. A group is as large as the tiles have room for (kFanIn at most). On an
// H200 a level takes 1.9 us (a write, two fences and a semaphore between them, one trip to L2) and 0.67 us for each result
// of 24 rows, 128 wide, 9.2 KiB: the four warps of one block fetch and add them one after the other. The three levels
// above are 17 of the 44 us that 131072 keys take.
//
// The softmax is the one with a running maximum, in every call: its cost hides behind memory. The largest weight of a
// row is then exactly 1, and the sum of the unrounded weights is a good enough divisor
// (docs/attention.md#bounded-softmax).
//
// Not supported: float32, head_dim above 128 (attention_launch.h).
#pragma once

#include <cstdint>

#include "attention_tile.cuh"

namespace andromeda::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpLanes;
inline constexpr int kSlice = 16;                          // keys of a warp at a time: the depth of an mma
inline constexpr int kDecodeStep = kDecodeWarps * kSlice;  // keys of a block at a time
inline constexpr int kFanIn = 16;                          // partial results that one block adds, at most

// What the launcher decided, the same for all blocks.
struct DecodePlan {
  unsigned char* partials;  // of the workspace: num_partials of a row tile together, level by level
  unsigned* semaphores;     // num_semaphores of a row tile together, zero between calls
  int num_rows;             // seqlen_q * group
  int group;                // query heads of a key head
  int num_row_tiles, num_shares, num_partials, num_semaphores;
  int fan_in;        // partial results that one block adds: the last block of a level may have fewer
  int partial_rows;  // that a partial result has room for
  float scale2, inverse_scale;
  bool in_chunks;
};

// What remains of a row after a share, or after several.
struct Statistics {
  float maximum;  // of the scores, base 2
  float sum;      // of the weights relative to it
};

// A partial result in the workspace, of a share or of a group of the level before: only rows that exist, one behind the
// other. A row is its sums of weights * values relative to its maximum, as the upper 16 bits of kHeadDim floats and
// then bits 8 to 15 of each; behind all rows are their statistics.
//
// Sums of 16 significant bits are enough: rounding moves each by 2^-16 of itself at most, and the weights in it have
// been rounded to 8 bits (float16: 11) for the product already. In three levels that is less than a tenth of what those
// may have moved it by, and the bytes a block waits for are fewer by a quarter.
template <int kHeadDim>
struct PartialLayout {
  static constexpr int kRowBytes = 3 * kHeadDim;
  static constexpr int kLowBytes = 2 * kHeadDim;  // where the lower bits begin
  static_assert(kRowBytes % kChunkBytes == 0, "rows are copied in chunks");

  // The statistics are copied in chunks too, two rows each.
  __host__ __device__ static constexpr int statistics_at(int rows) { return rows * kRowBytes; }
  __host__ __device__ static constexpr int bytes(int rows) {
    return statistics_at(rows) + (rows + rows % 2) * static_cast<int>(sizeof(Statistics));
  }
};

// Shared memory that is read element by element, behind the tiles.
template <int kRows>
struct DecodeShared {
  Row rows[kRows];
  int head[kRows];  // -1: the row does not exist
  float raw_slope[kRows];
  alignas(kChunkBytes) Statistics statistics[kFanIn][kRows];  // of what is being added
  float factor[kFanIn][kRows];                                // that takes each to the common maximum
  Statistics total[kRows];
  bool is_last;
};

template <int kHeadDim, int kGroups>
struct DecodeTiles {
  static constexpr int kRows = 16 * kGroups;
  static constexpr int kQueryBytes = kTileBytes<kRows, kHeadDim>;
  static constexpr int kSliceBytes = kTileBytes<kSlice, kHeadDim>;  // keys, or values
  static constexpr int kStages = 256 / kHeadDim;
  static constexpr int kRingBytes = kStages * 2 * kSliceBytes;  // of a warp
  static constexpr int kTilesBytes = kQueryBytes + kDecodeWarps * kRingBytes;
  static constexpr int kBytes = kTilesBytes + sizeof(DecodeShared<kRows>);
  static_assert(kQueryBytes % kTileAlignment == 0 && kSliceBytes % kTileAlignment == 0);
  static_assert(kBytes <= 99 * 1024, "8.6, 8.9 and 12.0 have no more");

  // The outputs of the warps lie here when the tiles are done with. Eight floats more per row put the four rows that
  // half a warp writes at once into different banks.
  static constexpr int kOutPitch = kHeadDim + 8;
  static_assert(kDecodeWarps * kRows * kOutPitch * static_cast<int>(sizeof(float)) <= kTilesBytes);

  // Afterwards partial results of `rows` rows, of which a block keeps its own in registers.
  static constexpr int max_fan_in(int rows) {
    const int others = kTilesBytes / (rows * PartialLayout<kHeadDim>::kRowBytes);
    return others < kFanIn ? others + 1 : kFanIn;
  }
  static_assert(max_fan_in(kRows) >= 2);
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// A packed row as a query of one head.
struct PackedRow {
  int query, head;
  bool exists;
};

__device__ inline PackedRow unpack_row(const DecodePlan& plan, int kv_head, int packed) {
  const int query = packed / plan.group;
  return {query, kv_head * plan.group + (packed - query * plan.group), packed < plan.num_rows};
}

__device__ inline std::int64_t offset_of(const SeqStrides& stride, int batch, int seq, int head) {
  return batch * stride.batch + seq * stride.seq + head * stride.head;
}

// Begins to copy the query rows of the block; rows and channels that do not exist become zero.
template <int kHeadDim, int kRows, typename T>
__device__ inline void load_queries(std::uint32_t tile, const AttentionParams& params, const DecodePlan& plan,
                                    int batch, int kv_head, int first_row, int thread) {
  constexpr int kChunks = kHeadDim / kChunkWidth<T>;
  static_assert(kRows * kChunks % kDecodeThreads == 0);
  const T* q = static_cast<const T*>(params.q);
#pragma unroll 1
  for (int i = thread; i < kRows * kChunks; i += kDecodeThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const PackedRow packed = unpack_row(plan, kv_head, first_row + row);
    const int channels = packed.exists ? params.head_dim - chunk * kChunkWidth<T> : 0;
    const T* source = q;
    if (channels > 0) {
      source += offset_of(params.q_stride, batch, packed.query, packed.head) + chunk * kChunkWidth<T>;
    }
    const std::uint32_t target = tile + chunk_offset<kRows>(row, chunk);
    if (plan.in_chunks) {
      cp_async(target, source, channels > 0 ? kChunkBytes : 0);
    } else {
      copy_elements(target, source, channels);
    }
  }
}

// Describes the block's rows, one per lane: writes them to `shared` (one warp does) and returns what they see.
template <int kRows>
__device__ inline Reach describe_rows(DecodeShared<kRows>* shared, const AttentionParams& params,
                                      const DecodePlan& plan, int batch, int kv_head, int first_row, bool write) {
  const int lane = static_cast<int>(threadIdx.x);
  const PackedRow packed = unpack_row(plan, kv_head, first_row + lane);
  const bool exists = lane < kRows && packed.exists;
  Head head{0.0f, 0.0f, kUnlimited};
  if (exists) head = describe_head(params, packed.head);
  const Row row = describe_row(params, batch, exists ? packed.query : params.seqlen_q);
  if (write && lane < kRows) {
    shared->rows[lane] = row;
    shared->head[lane] = exists ? packed.head : -1;
    shared->raw_slope[lane] = head.slope * plan.inverse_scale;
  }
  return Reach::of(row, exists, head.window).of_warp();
}

// ---- one slice of a warp --------------------------------------------------------------------------------------------

inline constexpr int kScoreTiles = kSlice / 8;

// A lane's four rows (two without a second group): [group][half] is row 16 * group + 8 * half + lane / 4.
template <int kGroups>
struct LaneRows {
  float raw_slope[kGroups][2];
  int position[kGroups][2];
  float maximum[kGroups][2];  // of the scores so far, base 2; -inf before the first visible key
  float sum[kGroups][2];      // of the weights in this lane's columns
};

// Sets the accumulators to the bias. Rows have slopes of their own, so every score needs its own instruction pair, and
// the form with |.| serves keys on either side. `key` is that of the lane's first column.
template <int kGroups>
__device__ inline void seed_row_bias(float (&scores)[kGroups][kScoreTiles][4], const LaneRows<kGroups>& rows, int key) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float distance = static_cast<float>(key - rows.position[group][half]);  // exact: formed in integers
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          scores[group][n][2 * half + i] =
              -rows.raw_slope[group][half] * fabsf(distance + static_cast<float>(8 * n + i));
        }
      }
    }
  }
}

// A row without a visible key so far has no maximum: any finite one serves, its weights are 0.
__device__ inline float reference_of(float maximum) { return maximum == -__int_as_float(0x7f800000) ? 0.0f : maximum; }

// Scores become weights relative to the new maximum; what was summed before is brought to it.
template <int kHeadDim, int kGroups>
__device__ inline void update_softmax(float (&scores)[kGroups][kScoreTiles][4], LaneRows<kGroups>& rows,
                                      float (&out)[kGroups][kHeadDim / 8][4], float scale2) {
  float maximum[kGroups][2];
  bool grew = false;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = fmaxf(scores[group][0][2 * half], scores[group][0][2 * half + 1]);
#pragma unroll
      for (int n = 1; n < kScoreTiles; ++n) {
        largest = fmaxf(largest, fmaxf(scores[group][n][2 * half], scores[group][n][2 * half + 1]));
      }
      largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));  // a row lies in four lanes
      largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
      maximum[group][half] = fmaxf(rows.maximum[group][half], largest * scale2);
      grew |= maximum[group][half] > rows.maximum[group][half];
    }
  }
  // Maxima grow often at first and seldom later: the output, most of the registers, is then left alone.
  if (__any_sync(kWholeWarp, grew)) {
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float factor = exp2_approx(rows.maximum[group][half] - reference_of(maximum[group][half]));
        rows.maximum[group][half] = maximum[group][half];
        rows.sum[group][half] *= factor;
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          out[group][n][2 * half] *= factor;
          out[group][n][2 * half + 1] *= factor;
        }
      }
    }
  }
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reference = reference_of(rows.maximum[group][half]);
#pragma unroll
      for (int n = 0; n < kScoreTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& score = scores[group][n][2 * half + i];
          score = exp2_approx(fmaf(score, scale2, -reference));
          rows.sum[group][half] += score;
        }
      }
    }
  }
}

// ---- adding partial results -----------------------------------------------------------------------------------------

// A thread owns these four channels of a row, whatever is added: number `i` of kVectors.
template <int kHeadDim>
struct OwnVector {
  int row, channel;
  __device__ OwnVector(int thread, int i) {
    const int vector = thread + i * kDecodeThreads;
    row = vector / (kHeadDim / 4);
    channel = vector % (kHeadDim / 4) * 4;
  }
};

// From the statistics of `count` parts in shared memory: the totals, and the factor of each part. Barriers around it.
template <int kRows>
__device__ inline void combine_statistics(DecodeShared<kRows>* shared, int count, int rows, int thread) {
  if (thread >= rows) return;
  float maximum = shared->statistics[0][thread].maximum;
  for (int part = 1; part < count; ++part) maximum = fmaxf(maximum, shared->statistics[part][thread].maximum);
  const float reference = reference_of(maximum);
  float sum = 0.0f;
  for (int part = 0; part < count; ++part) {
    const Statistics of_part = shared->statistics[part][thread];
    const float factor = exp2_approx(of_part.maximum - reference);
    shared->factor[part][thread] = factor;
    sum = fmaf(of_part.sum, factor, sum);
  }
  shared->total[thread] = {maximum, sum};
}

__device__ inline void add_scaled(float4& total, const float4& part, float factor) {
  total.x = fmaf(part.x, factor, total.x);
  total.y = fmaf(part.y, factor, total.y);
  total.z = fmaf(part.z, factor, total.z);
  total.w = fmaf(part.w, factor, total.w);
}

// The sum of the outputs of the warps, each in its rows of `staging`.
template <int kHeadDim, int kGroups, int kVectors>
__device__ inline void add_warps(float4 (&total)[kVectors], const DecodeShared<16 * kGroups>* shared,
                                 const float* staging, int thread) {
  using Tiles = DecodeTiles<kHeadDim, kGroups>;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const OwnVector<kHeadDim> own(thread, i);
    total[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int warp = 0; warp < kDecodeWarps; ++warp) {
      const float* part = staging + (warp * Tiles::kRows + own.row) * Tiles::kOutPitch + own.channel;
      add_scaled(total[i], *reinterpret_cast<const float4*>(part), shared->factor[warp][own.row]);
    }
  }
}

// Four sums as a partial result has them.
struct Stored {
  uint2 high;         // the upper halves
  std::uint32_t low;  // the next byte of each
};

// To the nearest float of 16 significant bits, in the upper 24; the last 8 are of no account. A NaN needs care: a carry
// could run through it into the sign, and all that tells it from an infinity may be in those 8.
__device__ inline std::uint32_t round_to_store(float value) {
  return isnan(value) ? 0x7FFFFFFFu : __float_as_uint(value) + 0x80u;
}

__device__ inline Stored to_stored(const float4& values) {
  const std::uint32_t bits[4] = {round_to_store(values.x), round_to_store(values.y), round_to_store(values.z),
                                 round_to_store(values.w)};
  return {make_uint2(__byte_perm(bits[0], bits[1], 0x7632), __byte_perm(bits[2], bits[3], 0x7632)),
          __byte_perm(__byte_perm(bits[0], bits[1], 0x0051), __byte_perm(bits[2], bits[3], 0x0051), 0x5410)};
}

__device__ inline float4 from_stored(const Stored& stored) {
  const auto value = [&](std::uint32_t high, int selector) {
    return __uint_as_float(__byte_perm(high, stored.low, selector) & 0xFFFFFF00u);
  };
  return make_float4(value(stored.high.x, 0x1040), value(stored.high.x, 0x3250), value(stored.high.y, 0x1060),
                     value(stored.high.y, 0x3270));
}

// The block's part for the next level: `own` is what the others will read.
template <int kRows, int kHeadDim, int kVectors>
__device__ inline void write_partial(unsigned char* partial, const Stored (&own)[kVectors],
                                     const DecodeShared<kRows>* shared, int partial_rows, int rows, int thread) {
  using Layout = PartialLayout<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const OwnVector<kHeadDim> vector(thread, i);
    if (vector.row >= rows) continue;
    unsigned char* row = partial + vector.row * Layout::kRowBytes;
    *reinterpret_cast<uint2*>(row + 2 * vector.channel) = own[i].high;
    *reinterpret_cast<std::uint32_t*>(row + Layout::kLowBytes + vector.channel) = own[i].low;
  }
  if (thread < rows) {
    reinterpret_cast<Statistics*>(partial + Layout::statistics_at(partial_rows))[thread] = shared->total[thread];
  }
}

// Begins to copy `count` partial results of a group, all but that of this block: the statistics as one group of copies,
// the rows as another, one part behind the other at `places`. Both come from L2, where the others' writes are.
template <int kRows, int kHeadDim>
__device__ inline void fetch_partials(std::uint32_t places, DecodeShared<kRows>* shared, const unsigned char* partials,
                                      int count, int own_part, int partial_rows, int rows, int thread) {
  using Layout = PartialLayout<kHeadDim>;
  const std::int64_t bytes = Layout::bytes(partial_rows);
  if (2 * thread < rows) {
    const unsigned char* source = partials + Layout::statistics_at(partial_rows) + thread * kChunkBytes;
    const int exist = min(rows - 2 * thread, 2) * static_cast<int>(sizeof(Statistics));
#pragma unroll 1
    for (int part = 0; part < count; ++part, source += bytes) {
      if (part != own_part) cp_async(shared_address(&shared->statistics[part][2 * thread]), source, exist);
    }
  }
  cp_async_commit();
  const int row_bytes = rows * Layout::kRowBytes;
#pragma unroll 1
  for (int part = 0; part < count; ++part, partials += bytes) {
    if (part == own_part) continue;
#pragma unroll 4
    for (int at = thread * kChunkBytes; at < row_bytes; at += kDecodeThreads * kChunkBytes) {
      cp_async(places + at, partials + at, kChunkBytes);
    }
    places += row_bytes;
  }
  cp_async_commit();
}

// The sum of `count` partial results in the order of their numbers, this block's from registers.
template <int kRows, int kHeadDim, int kVectors>
__device__ inline void add_partials(float4 (&total)[kVectors], const Stored (&own)[kVectors],
                                    const DecodeShared<kRows>* shared, const unsigned char* places, int count,
                                    int own_part, int rows, int thread) {
  using Layout = PartialLayout<kHeadDim>;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) total[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
  for (int part = 0; part < count; ++part) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const OwnVector<kHeadDim> vector(thread, i);
      if (vector.row >= rows) continue;
      Stored stored = own[i];
      if (part != own_part) {
        const unsigned char* row = places + vector.row * Layout::kRowBytes;
        stored.high = *reinterpret_cast<const uint2*>(row + 2 * vector.channel);
        stored.low = *reinterpret_cast<const std::uint32_t*>(row + Layout::kLowBytes + vector.channel);
      }
      add_scaled(total[i], from_stored(stored), shared->factor[part][vector.row]);
    }
    if (part != own_part) places += rows * Layout::kRowBytes;
  }
}

// How many of `count` blocks drew this semaphore before. The counter wraps to 0: the next call finds it as this one did.
//
// One thread draws for its block, between two barriers. Release: its fence comes after what all threads wrote before
// the first barrier, and before the atomic. Acquire: the atomic, then a fence of the same thread, then the second
// barrier and whoever reads behind it. In PTX's memory model the atomic and the fence must be of one thread: behind the
// barrier the other threads' own fences would add nothing.
__device__ inline unsigned draw_ticket(unsigned* semaphore, int count) {
  fence_device();
  const unsigned drawn = atomicInc(semaphore, count - 1);
  fence_device();
  return drawn;
}

// Divides, rounds and writes the rows of the block, and their log-sum-exp.
template <typename T, int kRows, int kHeadDim, int kVectors>
__device__ inline void write_rows(const AttentionParams& params, const DecodePlan& plan, int batch,
                                  const float4 (&total)[kVectors], const DecodeShared<kRows>* shared, int thread) {
  const int first_position = params.seqlen_k - params.seqlen_q;  // of query 0
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    const OwnVector<kHeadDim> own(thread, i);
    const int head = shared->head[own.row], query = shared->rows[own.row].position - first_position;
    const int channels = params.head_dim - own.channel;
    if (head < 0 || channels <= 0) continue;
    const float sum = shared->total[own.row].sum;
    const float factor = sum == 0.0f ? 0.0f : 1.0f / sum;  // 0: a row that sees no key; a NaN stays one
    const uint2 bits = make_uint2(pack<T>(total[i].x * factor, total[i].y * factor),
                                  pack<T>(total[i].z * factor, total[i].w * factor));
    T* target = static_cast<T*>(params.out) + offset_of(params.out_stride, batch, query, head) + own.channel;
    if (plan.in_chunks) {
      *reinterpret_cast<uint2*>(target) = bits;
    } else {
      const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int channel = 0; channel < 4; ++channel) {
        if (channel < channels) target[channel] = elements[channel];
      }
    }
  }
  if (thread < kRows) {
    if (shared->head[thread] < 0) return;
    const std::int64_t head = static_cast<std::int64_t>(batch) * params.num_heads + shared->head[thread];
    const int query = shared->rows[thread].position - first_position;
    params.softmax_lse[head * params.seqlen_q + query] =
        fmaf(shared->total[thread].maximum, kLn2, logf(shared->total[thread].sum));
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------------------

// Blocks of dim3(32, kDecodeWarps), so that threadIdx.x is the lane: load_tile then works for one warp. Row tiles of
// the same keys are neighbours in the grid: the second reads what the first has brought to L2.
template <typename T, int kHeadDim, int kGroups>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_decode_kernel(const __grid_constant__ AttentionParams params, const __grid_constant__ DecodePlan plan) {
  using Tiles = DecodeTiles<kHeadDim, kGroups>;
  constexpr int kRows = Tiles::kRows, kStages = Tiles::kStages;
  extern __shared__ __align__(kTileAlignment) unsigned char shared_memory[];
  auto* shared = reinterpret_cast<DecodeShared<kRows>*>(shared_memory + Tiles::kTilesBytes);
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int thread = warp * kWarpLanes + lane;
  const std::uint32_t queries = shared_address(shared_memory);
  const std::uint32_t ring = queries + Tiles::kQueryBytes + warp * Tiles::kRingBytes;

  int block = static_cast<int>(blockIdx.x);
  const int row_tile = block % plan.num_row_tiles;
  block /= plan.num_row_tiles;
  const int share = block % plan.num_shares;
  block /= plan.num_shares;
  const int kv_head = block % params.num_kv_heads, batch = block / params.num_kv_heads;
  const int first_row = row_tile * kRows;

  // The rows, and which keys they see.
  load_queries<kHeadDim, kRows, T>(queries, params, plan, batch, kv_head, first_row, thread);
  cp_async_commit();
  const Reach reach = describe_rows(shared, params, plan, batch, kv_head, first_row, warp == 0);

  // This block's run of steps and this warp's slices of it: numbers 0 ... num_slices - 1, kDecodeStep keys apart.
  const int begin = reach.begin / kSlice * kSlice;
  const std::int64_t num_keys = max(static_cast<std::int64_t>(reach.end) - begin, static_cast<std::int64_t>(0));
  const std::int64_t num_steps = (num_keys + kDecodeStep - 1) / kDecodeStep;
  const std::int64_t first_offset = num_steps * share / plan.num_shares * kDecodeStep + warp * kSlice;
  const std::int64_t end_offset = min(num_steps * (share + 1) / plan.num_shares * kDecodeStep, num_keys);
  const int num_slices =
      static_cast<int>((max(end_offset - first_offset, static_cast<std::int64_t>(0)) + kDecodeStep - 1) / kDecodeStep);
  const int first_key = static_cast<int>(begin + first_offset);

  const T* key_data = static_cast<const T*>(params.k) + offset_of(params.k_stride, batch, 0, kv_head);
  const T* value_data = static_cast<const T*>(params.v) + offset_of(params.v_stride, batch, 0, kv_head);
  const Rows<const T> keys{key_data, params.k_stride.seq, params.seqlen_k, params.head_dim, plan.in_chunks};
  const Rows<const T> values{value_data, params.v_stride.seq, params.seqlen_k, params.head_dim, plan.in_chunks};
  // Every call commits a group, an empty one past the end, so that a fixed number of younger groups says "arrived".
  const auto load_slice = [&](const Rows<const T>& rows, int slice, std::uint32_t place) {
    if (slice < num_slices) {
      load_tile<kSlice, kHeadDim, kWarpLanes>(place, rows, first_key + slice * kDecodeStep);
    }
    cp_async_commit();
  };
  const auto keys_of = [&](int slice) { return ring + slice % kStages * (2 * Tiles::kSliceBytes); };
  const auto values_of = [&](int slice) { return keys_of(slice) + Tiles::kSliceBytes; };
  constexpr int kYounger = 2 * kStages - 1;
#pragma unroll 1
  for (int slice = 0; slice < kStages; ++slice) {
    load_slice(keys, slice, keys_of(slice));
    load_slice(values, slice, values_of(slice));
  }
  cp_async_wait<2 * kStages>();  // the queries
  __syncthreads();               // everyone's, and the description of the rows

  LaneRows<kGroups> rows;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * 16 + half * 8 + (lane >> 2);
      rows.raw_slope[group][half] = shared->raw_slope[row];
      rows.position[group][half] = shared->rows[row].position;
      rows.maximum[group][half] = -__int_as_float(0x7f800000);
      rows.sum[group][half] = 0.0f;
    }
  }
  float out[kGroups][kHeadDim / 8][4] = {};

  for (int slice = 0; slice < num_slices; ++slice) {
    const int key = first_key + slice * kDecodeStep;
    const int lane_key = key + ((lane & 3) << 1);
    float scores[kGroups][kScoreTiles][4];
    seed_row_bias(scores, rows, lane_key);
    cp_async_wait<kYounger>();
    __syncwarp();  // the keys of all lanes have arrived
    multiply_transposed<T, kHeadDim, kRows, kSlice>(scores, queries, 0, keys_of(slice));
    __syncwarp();  // the keys have been read by all lanes
    load_slice(keys, slice + kStages, keys_of(slice));

    const bool plain = reach.is_plain(key, kSlice);
    if (!plain) hide(scores, shared->rows, lane_key);
    update_softmax<kHeadDim>(scores, rows, out, plan.scale2);
    std::uint32_t weights[kGroups][4];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) pack_operand<T>(weights[group], scores[group], 0);

    cp_async_wait<kYounger>();
    __syncwarp();  // the values of all lanes have arrived
    if (plain || is_finite<T, Tiles::kSliceBytes>(values_of(slice))) {
      multiply_step<T, kHeadDim, kSlice>(out, weights, values_of(slice), 0);
    } else {
      multiply_step<T, kHeadDim, kSlice, kGroups, true>(out, weights, values_of(slice), 0);
      add_not_finite<T, kHeadDim, kSlice>(out, shared->rows, key, values_of(slice));
    }
    __syncwarp();  // the values have been read by all lanes
    load_slice(values, slice + kStages, values_of(slice));
  }

  // The warps' results become the block's.
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    sum_over_group(rows.sum[group], 2);  // the four lanes of a row
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = group * 16 + half * 8 + (lane >> 2);
      if ((lane & 3) == 0) {
        shared->statistics[warp][row] = {rows.maximum[group][half], rows.sum[group][half]};
      }
    }
  }
  __syncthreads();  // statistics are there; all warps have finished with queries and ring, which become staging
  auto* staging = reinterpret_cast<float*>(shared_memory);
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * kRows + group * 16 + half * 8 + (lane >> 2);
      auto* target = reinterpret_cast<float2*>(staging + row * Tiles::kOutPitch + ((lane & 3) << 1));
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) {
        target[n * 4] = make_float2(out[group][n][2 * half], out[group][n][2 * half + 1]);
      }
    }
  }
  combine_statistics(shared, kDecodeWarps, kRows, thread);
  __syncthreads();  // outputs and factors are there
  constexpr int kVectors = kRows * kHeadDim / 4 / kDecodeThreads;
  float4 total[kVectors];
  add_warps<kHeadDim, kGroups>(total, shared, staging, thread);

  // The shares' results become the tile's, level by level.
  const std::int64_t tile =
      (static_cast<std::int64_t>(batch) * params.num_kv_heads + kv_head) * plan.num_row_tiles + row_tile;
  const std::int64_t partial_bytes = PartialLayout<kHeadDim>::bytes(plan.partial_rows);
  unsigned char* level = plan.partials + tile * plan.num_partials * partial_bytes;
  unsigned* semaphores = plan.semaphores + tile * plan.num_semaphores;
  const int rows_here = min(plan.num_rows - first_row, kRows);
  int index = share, count = plan.num_shares;
  while (count > 1) {
    Stored own[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) own[i] = to_stored(total[i]);
    write_partial<kRows, kHeadDim>(level + index * partial_bytes, own, shared, plan.partial_rows, rows_here, thread);
    const int group = index / plan.fan_in, first = group * plan.fan_in, size = min(count - first, plan.fan_in);
    const int own_part = index - first;
    __syncthreads();  // the whole block has written its part before the semaphore says so, and read what it adds
    if (thread == 0) shared->is_last = draw_ticket(semaphores + group, size) == static_cast<unsigned>(size) - 1;
    __syncthreads();  // what the semaphore has announced may be read
    if (!shared->is_last) return;
    fetch_partials<kRows, kHeadDim>(queries, shared, level + first * partial_bytes, size, own_part, plan.partial_rows,
                                    rows_here, thread);
    if (thread < rows_here) shared->statistics[own_part][thread] = shared->total[thread];
    cp_async_wait<1>();
    __syncthreads();  // all statistics are there
    combine_statistics(shared, size, rows_here, thread);
    cp_async_wait<0>();
    __syncthreads();  // all rows and factors are there
    add_partials<kRows, kHeadDim>(total, own, shared, shared_memory, size, own_part, rows_here, thread);
    level += count * partial_bytes;
    index = group;
    count = (count + plan.fan_in - 1) / plan.fan_in;
    semaphores += count;
  }
  write_rows<T, kRows, kHeadDim>(params, plan, batch, total, shared, thread);
}

}  // namespace andromeda::cuda
