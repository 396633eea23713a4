// Shared by the decode kernels (decode.cuh, combine.cuh, hopper/attention_decode.cuh) and their launchers: the plan of a
// call, the layout of shared memory, and those of partial results in the workspace.
#pragma once

#include <cstdint>

#include "attention/mask.cuh"
#include "attention/tile.cuh"
#include "divisor.cuh"
#include "load.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpLanes;
inline constexpr int kSlice = 16;                          // keys of a warp at a time: the depth of an mma
inline constexpr int kDecodeStep = kDecodeWarps * kSlice;  // keys of a block at a time
inline constexpr int kFanIn = 16;                          // partial results that one block adds, at most
inline constexpr int kMaxClusterSizeLog2 = 3;              // 8 blocks: the most that every device with clusters takes
inline constexpr int kMaxClusterSize = 1 << kMaxClusterSizeLog2;

// The decisions of the launcher, the same for all blocks.
struct DecodePlan {
  unsigned char* partials;  // in the workspace: those of a row block lie together, level by level
  unsigned* semaphores;     // those of a row block lie together; zero between calls
  int num_rows;             // seqlen_q * qhead_per_kvhead
  int cluster_size_log2;    // of the blocks that add their parts through shared memory, on 9.0; else 0
  Divisor qhead_per_kvhead, num_kv_heads, num_row_blocks;
  Divisor num_splits, num_clusters;    // num_splits / cluster_size
  Divisor fan_in;                      // partial results that one block adds; the last node of a level may have fewer
  int tile_partials, tile_semaphores;  // of a row block
  int partial_rows;                    // rows that a partial result has room for
  float softmax_scale_log2, inverse_softmax_scale;
  bool is_aligned16;
};

// The statistics of one row of a partial result.
struct Statistics {
  float maximum;  // of the scores, base 2
  float sum;      // of the weights relative to it
};

// A partial result in the workspace, of one split or of several. It holds the rows that exist, one after the other, and
// after them their statistics. A row is its sums of weights * values, relative to its maximum: the upper 16 bits
// of kHeadDim floats, then bits 8 to 15 of each.
//
// Sums of 16 significant bits are enough: rounding changes each by at most 2^-16 of itself, and the weights in it have
// already been rounded to 8 bits (float16: 11) for the product. In three levels this is less than a tenth of the error
// of the weights, and a block waits for a quarter fewer bytes.
template <int kHeadDim>
struct PartialLayout {
  static constexpr int kRowBytes = 3 * kHeadDim;
  static constexpr int kLowBytes = 2 * kHeadDim;  // where the lower bits begin
  static_assert(kRowBytes % kVec16Bytes == 0, "rows are copied 16 bytes at a time");

  // Statistics are copied 16 bytes at a time too: those of two rows.
  __host__ __device__ static constexpr int statistics_at(int rows) { return rows * kRowBytes; }
  __host__ __device__ static constexpr int bytes(int rows) {
    return statistics_at(rows) + (rows + rows % 2) * static_cast<int>(sizeof(Statistics));
  }
};

// A partial result of a cluster in the workspace: one for each slice of the channels, written by one block of the
// cluster. It holds kChannels sums of each row, and after them the statistics of the rows.
template <int kHeadDim>
struct SliceLayout {
  static constexpr int kChannels = kHeadDim / kMaxClusterSize;
  static_assert(kChannels % 4 == 0, "four channels are written at a time");

  __host__ __device__ static constexpr int statistics_at(int rows) { return rows * kChannels; }
  // In floats, a multiple of four: every slice is aligned to 16 bytes.
  __host__ __device__ static constexpr int size(int rows) { return statistics_at(rows) + 2 * (rows + rows % 2); }
};

// Shared memory that is read element by element, after the tiles.
template <int kRows>
struct DecodeShared {
  Row rows[kRows];
  int head[kRows];  // -1: the row does not exist
  float raw_slope[kRows];
  alignas(kVec16Bytes) Statistics statistics[kFanIn][kRows];  // of the parts that are being added
  float factor[kFanIn][kRows];                                // rescales each part to the common maximum
  Statistics total[kRows];
  int first_position;  // of query 0 among the keys
  bool is_last;
};

template <int kHeadDim, int kRowTiles>
struct DecodeTiles {
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kQueryBytes = kTileBytes<kRows, kHeadDim>;
  static constexpr int kSliceBytes = kTileBytes<kSlice, kHeadDim>;  // keys, or values
  static constexpr int kStages = 256 / kHeadDim;
  static constexpr int kRingBytes = kStages * 2 * kSliceBytes;  // of a warp
  static constexpr int kTilesBytes = kQueryBytes + kDecodeWarps * kRingBytes;
  static constexpr int kBytes = kTilesBytes + sizeof(DecodeShared<kRows>);
  static_assert(kQueryBytes % kTileAlignment == 0 && kSliceBytes % kTileAlignment == 0);
  static_assert(kBytes <= 99 * 1024, "8.6, 8.9 and 12.0 have no more");

  __device__ static DecodeShared<kRows>* shared_of(unsigned char* shared_memory) {
    return reinterpret_cast<DecodeShared<kRows>*>(shared_memory + kTilesBytes);
  }

  // The outputs of the warps take the place of the tiles. Eight more floats per row put the four rows that half a warp
  // writes at once into different banks.
  static constexpr int kOutPitch = kHeadDim + 8;
  static constexpr int kOutBytes = kRows * kOutPitch * static_cast<int>(sizeof(float));  // of a warp
  static_assert(kDecodeWarps * kOutBytes <= kTilesBytes);
  __device__ static int out_offset(int row, int channel) {
    return (row * kOutPitch + channel) * static_cast<int>(sizeof(float));
  }

  // After that, partial results of `rows` rows take their place. A block keeps its own one in registers.
  static constexpr int max_fan_in(int rows) {
    const int others = kTilesBytes / (rows * PartialLayout<kHeadDim>::kRowBytes);
    return others < kFanIn ? others + 1 : kFanIn;
  }
  static_assert(max_fan_in(kRows) >= 2);
};

}  // namespace andromeda::cuda
