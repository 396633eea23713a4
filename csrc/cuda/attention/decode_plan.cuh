// What the decode kernel (decode.cuh), its last part (combine.cuh) and its launcher (decode.cu) agree on: the plan of a
// call, shared memory, partial results in the workspace.
#pragma once

#include <cstdint>

#include "attention/mask.cuh"
#include "attention/tile.cuh"
#include "load.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kDecodeWarps = 4;
inline constexpr int kDecodeThreads = kDecodeWarps * kWarpLanes;
inline constexpr int kSlice = 16;                          // keys of a warp at a time: the depth of an mma
inline constexpr int kDecodeStep = kDecodeWarps * kSlice;  // keys of a block at a time
inline constexpr int kFanIn = 16;                          // partial results that one block adds, at most

// What the launcher decided, the same for all blocks.
struct DecodePlan {
  unsigned char* partials;  // of the workspace: tile_partials of a row tile together, level by level
  unsigned* semaphores;     // tile_semaphores of a row tile together, zero between calls
  int num_rows;             // seqlen_q * group
  int qhead_per_kvhead;     // query heads of a key head
  int num_row_blocks, num_splits, tile_partials, tile_semaphores;
  int fan_in;        // partial results that one block adds: the last block of a level may have fewer
  int partial_rows;  // that a partial result has room for
  float softmax_scale_log2, inverse_softmax_scale;
  bool is_aligned16;
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
  static_assert(kRowBytes % kVec16Bytes == 0, "rows are copied in vecs");

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
  alignas(kVec16Bytes) Statistics statistics[kFanIn][kRows];  // of what is being added
  float factor[kFanIn][kRows];                                // that takes each to the common maximum
  Statistics total[kRows];
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

}  // namespace andromeda::cuda
