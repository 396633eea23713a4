// Tiles of the attention kernels in shared memory: their layout, copies into them, products of tiles, and the stores of
// results to global memory.
//
// A tile of kRows rows is stored in panels of 64 channels. A row of a panel is 128 bytes, eight vectors of 16 bytes,
// and vector x of row r is stored at position x ^ (r % 8) (a swizzle):
//
//            position 0  1  2  3  4  5  6  7
//   row 0    vector   0  1  2  3  4  5  6  7        cp.async: eight lanes write one row, all 32 banks once.
//   row 1             1  0  3  2  5  4  7  6        ldmatrix: eight rows, one vector each, in eight positions:
//   row 2             2  3  0  1  6  7  4  5        all 32 banks once.
//   ...
//
// Every address that a lane uses has r % 8 == lane % 8, so the step from one pair of vectors to the next is one xor.
#pragma once

#include <cstdint>
#include <cstring>

#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr int kPanelWidth = 64;       // channels
inline constexpr int kPanelRowBytes = 128;   // of a 16-bit type
inline constexpr int kTileAlignment = 1024;  // eight rows: the pattern above depends on address bits 7 to 9 alone

template <int kRows, int kHeadDim>
inline constexpr int kTileBytes = kRows * kHeadDim * 2;

// Byte offset of vector `vec` (8 channels) of row `row`.
template <int kRows>
__device__ inline std::uint32_t vec_offset(int row, int vec) {
  return (vec >> 3) * (kRows * kPanelRowBytes) + row * kPanelRowBytes + (((vec ^ row) & 7) << 4);
}

template <typename T>
__device__ inline Vec16<T> load_shared(std::uint32_t address) {
  const uint4 words = ld_shared16(address);
  Vec16<T> vec;
  memcpy(&vec, &words, sizeof vec);
  return vec;
}

// Rows of one head in global memory: `data` is row 0.
template <typename T>
struct Rows {
  T* data;
  std::int64_t stride;  // in elements
  int count;            // rows that exist
  int head_dim;         // channels that exist
  bool is_aligned16;    // every row starts at a multiple of 16 bytes, and head_dim is a multiple of 8
};

// threadIdx.x, read again. A loop over tiles would otherwise keep everything that depends on it in registers, for every
// tensor that it loads: six registers that the products need.
__device__ inline int read_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// Puts a value that is the same in all lanes into a uniform register: it and the values computed from it occupy no
// lane's register.
__device__ inline int uniform(int value) { return __reduce_max_sync(kWholeWarp, value); }

// Copies 16 bytes element by element, for rows that are not aligned. Elements from `count` on (it may be <= 0) are
// zero.
template <typename T>
__device__ inline void copy_elements(std::uint32_t target, const T* source, int count) {
  std::uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kVec16Width<T>; ++i) {
    if (i < count) {
      const std::uint32_t bits = __ldg(reinterpret_cast<const unsigned short*>(source) + i);
      words[i / 2] |= bits << (16 * (i % 2));
    }
  }
  st_shared16(target, make_uint4(words[0], words[1], words[2], words[3]));
}

// Begins to copy rows `first` ... `first + kRows - 1` into a tile; rows and channels that do not exist become zero.
// Copies of aligned rows are asynchronous: commit and wait. Others are complete, for this thread, on return. A barrier
// makes both visible to the block.
//
// The loops over tiles must be fast for whole tiles of aligned rows. All other tiles share one short loop, because its
// code lies in the middle of theirs and would fill the instruction cache: 0.8 KiB each time, 2.6 KiB when unrolled.
template <int kRows, int kHeadDim, int kThreads, typename T>
__device__ inline void load_tile(std::uint32_t tile, const Rows<const T>& rows, int first) {
  constexpr int kVecs = kHeadDim / kVec16Width<T>;  // of a row
  static_assert(kThreads % kVecs == 0 && kRows * kVecs % kThreads == 0, "a thread keeps its column");
  constexpr int kRowStep = kThreads / kVecs;
  const int thread = read_thread_index();
  const int row = thread / kVecs, vec = thread % kVecs;
  const int channels = rows.head_dim - vec * kVec16Width<T>;
  const std::uint32_t first_target = tile + vec_offset<kRows>(row, vec);
  const auto target = [&](int i) {  // eight rows later the pattern is the same
    return kRowStep % 8 == 0 ? first_target + i * kPanelRowBytes : tile + vec_offset<kRows>(row + i, vec);
  };
  const T* source = rows.data + (first + row) * rows.stride + (channels > 0 ? vec * kVec16Width<T> : 0);
  if (rows.is_aligned16 && first >= 0 && first + kRows <= rows.count) {
    constexpr int kCopies = kRows / kRowStep, kUnrolled = kCopies > 8 ? 4 : kCopies;  // an address is two registers
#pragma unroll kUnrolled
    for (int i = 0; i < kRows; i += kRowStep, source += kRowStep * rows.stride) {
      cp_async(target(i), source, channels > 0 ? kVec16Bytes : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kRows; i += kRowStep, source += kRowStep * rows.stride) {
    const bool inside = static_cast<unsigned>(first + row + i) < static_cast<unsigned>(rows.count) && channels > 0;
    if (rows.is_aligned16) {
      cp_async(target(i), inside ? source : rows.data, inside ? kVec16Bytes : 0);
    } else {
      copy_elements(target(i), source, inside ? channels : 0);
    }
  }
}

// A result of 16 * kRowTiles rows and 8 * kColumnTiles columns; mma.cuh says which elements of a tile a lane holds.
template <int kRowTiles, int kColumnTiles>
using Accumulator = float[kRowTiles][kColumnTiles][4];

// scores += a b^T: 16 * kRowTiles rows of tile `a` from `a_row` on, times all kRowsB rows of tile `b`.
// `kUnrolledSteps`, of 16 channels each, limits how early operands are loaded.
template <typename T, int kHeadDim, int kRowsA, int kRowsB, int kRowTiles, int kUnrolledSteps = kHeadDim / 16>
__device__ inline void multiply_transposed(float (&scores)[kRowTiles][kRowsB / 8][4], std::uint32_t a, int a_row,
                                           std::uint32_t b) {
  const int lane = read_thread_index() % kWarpLanes;
  const std::uint32_t a_base = a + vec_offset<kRowsA>(a_row + (lane & 15), lane >> 4);
  const std::uint32_t b_base = b + vec_offset<kRowsB>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
#pragma unroll kUnrolledSteps
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const std::uint32_t in_panel = (step & 3) << 5;
    const std::uint32_t a_panel = (step >> 2) * (kRowsA * kPanelRowBytes);
    const std::uint32_t b_panel = (step >> 2) * (kRowsB * kPanelRowBytes);
    std::uint32_t fragment[kRowTiles][4];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      ldmatrix(fragment[row_tile], (a_base ^ in_panel) + (a_panel + row_tile * (16 * kPanelRowBytes)));
    }
#pragma unroll
    for (int n = 0; n < kRowsB / 16; ++n) {
      std::uint32_t columns[4];
      ldmatrix(columns, (b_base ^ in_panel) + (b_panel + n * (16 * kPanelRowBytes)));
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        mma<T>(scores[row_tile][2 * n], fragment[row_tile], columns[0], columns[1]);
        mma<T>(scores[row_tile][2 * n + 1], fragment[row_tile], columns[2], columns[3]);
      }
    }
  }
}

// result += a b: `a` holds columns 16 * step ... of an operand of 16 * kRowTiles rows in registers, `b` is a tile with
// the rows of the same numbers. kClamped: numbers of b that are not finite are replaced, because the zeros of `a` stand
// for masked elements, and 0 * NaN is NaN.
template <typename T, int kHeadDim, int kRowsB, int kRowTiles, bool kClamped = false>
__device__ inline void multiply_step(float (&result)[kRowTiles][kHeadDim / 8][4],
                                     const std::uint32_t (&a)[kRowTiles][4], std::uint32_t b, int step) {
  const int lane = read_thread_index() % kWarpLanes;
  const std::uint32_t b_base = b + vec_offset<kRowsB>(lane & 15, lane >> 4);
#pragma unroll
  for (int n = 0; n < kHeadDim / 16; ++n) {
    std::uint32_t columns[4];
    const std::uint32_t b_rows = (n >> 2) * (kRowsB * kPanelRowBytes) + step * (16 * kPanelRowBytes);
    ldmatrix_transposed(columns, (b_base ^ ((n & 3) << 5)) + b_rows);
    if constexpr (kClamped) {
#pragma unroll
      for (std::uint32_t& pair : columns) pair = clamp_finite<T>(pair);
    }
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
      mma<T>(result[row_tile][2 * n], a[row_tile], columns[0], columns[1]);
      mma<T>(result[row_tile][2 * n + 1], a[row_tile], columns[2], columns[3]);
    }
  }
}

// Whether a tile of kBytes holds only finite numbers; the same in all lanes of the warp.
template <typename T, int kBytes>
__device__ inline bool is_finite(std::uint32_t tile) {
  std::uint32_t sum = 0;
  const std::uint32_t first = tile + read_thread_index() % kWarpLanes * kVec16Bytes;
#pragma unroll 4
  for (int at = 0; at < kBytes; at += kWarpLanes * kVec16Bytes) {
    const uint4 words = ld_shared16(first + at);
    for (const std::uint32_t word : {words.x, words.y, words.z, words.w}) detect_not_finite<T>(sum, word);
  }
  return !__any_sync(kWholeWarp, (sum & 0x7FFF7FFFu) != 0);
}

// result += b for the numbers of a tile that are not finite, in the rows that see them: the clamped product, whose
// weights are not negative, left them out. `rows` are those of `apply_mask`; row 0 of the tile is key `key`.
template <typename T, int kHeadDim, int kRowsB, int kRowTiles, typename R>
__device__ inline void add_not_finite(float (&result)[kRowTiles][kHeadDim / 8][4], const R* rows, int key,
                                      std::uint32_t b) {
  const int lane = read_thread_index() % kWarpLanes;
#pragma unroll 1
  for (int row = 0; row < kRowsB; ++row) {
    bool sees[kRowTiles][2];
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const R& own = rows[row_tile * 16 + half * 8 + (lane >> 2)];
        sees[row_tile][half] = own.first <= key + row && key + row < own.end;
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const std::uint32_t bits = ld_shared4(b + vec_offset<kRowsB>(row, n) + ((lane & 3) << 2));
      Pair<T> pair;
      memcpy(&pair, &bits, sizeof pair);
      const float2 numbers = to_floats(pair);
      const float left = isfinite(numbers.x) ? 0.0f : numbers.x, right = isfinite(numbers.y) ? 0.0f : numbers.y;
#pragma unroll
      for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!sees[row_tile][half]) continue;
          result[row_tile][n][2 * half] += left;
          result[row_tile][n][2 * half + 1] += right;
        }
      }
    }
  }
}

// Packs columns 16 * step ... 16 * step + 15 of a result as the A operand of the next product.
template <typename T, int kColumnTiles>
__device__ inline void pack_operand(std::uint32_t (&a)[4], const float (&values)[kColumnTiles][4], int step) {
  const float (&left)[4] = values[2 * step];
  const float (&right)[4] = values[2 * step + 1];
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// Writes 16 * kRowTiles rows of a result, each times its `factor` ([0]: row g, [1]: row g + 8), to rows `first` ... of
// `target`. They pass through rows `tile_row` ... of a tile, which this warp alone uses.
template <typename T, int kHeadDim, int kRowsTile, int kRowTiles>
__device__ inline void store_rows(const Rows<T>& target, int first, const float (&values)[kRowTiles][kHeadDim / 8][4],
                                  const float (&factor)[kRowTiles][2], std::uint32_t tile, int tile_row) {
  constexpr int kVecs = kHeadDim / kVec16Width<T>;
  constexpr int kRowStep = kWarpLanes / kVecs;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  __syncwarp();  // the other lanes' last reads of these rows are done
#pragma unroll
  for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&pair)[4] = values[row_tile][n];
        const std::uint32_t bits =
            pack<T>(pair[2 * half] * factor[row_tile][half], pair[2 * half + 1] * factor[row_tile][half]);
        const int row = tile_row + row_tile * 16 + half * 8 + (lane >> 2);
        st_shared4(tile + vec_offset<kRowsTile>(row, n) + ((lane & 3) << 2), bits);
      }
    }
  }
  __syncwarp();  // the rows are complete
  const int vec = lane % kVecs;
  const int channels = target.head_dim - vec * kVec16Width<T>;
#pragma unroll 1
  for (int row = lane / kVecs; row < 16 * kRowTiles; row += kRowStep) {
    if (first + row >= target.count || channels <= 0) continue;
    const Vec16<T> bits = load_shared<T>(tile + vec_offset<kRowsTile>(tile_row + row, vec));
    T* row_data = target.data + (first + row) * target.stride + vec * kVec16Width<T>;
    if (target.is_aligned16) {
      store<Access::kVec16>(row_data, bits, channels);
    } else {
      store_elements<kVec16Width<T>>(row_data, bits, channels);
    }
  }
}

}  // namespace andromeda::cuda
