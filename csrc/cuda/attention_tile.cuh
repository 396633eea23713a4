// What the attention kernels share: tiles in shared memory, products of tiles, which keys a row sees, the bias.
//
// A tile of kRows rows lies in panels of 64 channels. A row of a panel is 128 bytes, eight chunks of 16, and chunk x of
// row r sits at position x ^ (r % 8):
//
//            position 0  1  2  3  4  5  6  7
//   row 0    chunk    0  1  2  3  4  5  6  7        cp.async: eight lanes write one row, all 32 banks once.
//   row 1             1  0  3  2  5  4  7  6        ldmatrix: eight rows, one chunk each, in eight different positions:
//   row 2             2  3  0  1  6  7  4  5        all 32 banks once.
//   ...
//
// Every address a lane uses has r % 8 == lane % 8, so the step from one pair of chunks to the next is one xor.
//
// Scores are kept in units of <q, k>: the bias is divided by softmax_scale, and 2^(score * scale2) with
// scale2 = softmax_scale * log2(e) is the weight. log-sum-exps inside a kernel are in base 2.
#pragma once

#include <climits>
#include <cstdint>

#include "andromeda/attention.h"
#include "load.cuh"
#include "mma.cuh"
#include "warp.cuh"

namespace andromeda::cuda {

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// ---- tiles in shared memory -----------------------------------------------------------------------------------------

inline constexpr int kPanelWidth = 64;       // channels
inline constexpr int kPanelRowBytes = 128;   // of a 16-bit type
inline constexpr int kTileAlignment = 1024;  // eight rows: the pattern above depends on address bits 7 to 9 alone

template <int kRows, int kHeadDim>
inline constexpr int kTileBytes = kRows * kHeadDim * 2;

// Byte offset of chunk `chunk` (8 channels) of row `row`.
template <int kRows>
__device__ inline std::uint32_t chunk_offset(int row, int chunk) {
  return (chunk >> 3) * (kRows * kPanelRowBytes) + row * kPanelRowBytes + (((chunk ^ row) & 7) << 4);
}

// Rows of one head in global memory: `data` is row 0.
template <typename T>
struct Rows {
  T* data;
  std::int64_t stride;  // in elements
  int count;            // rows that exist
  int head_dim;         // channels that exist
  bool in_chunks;       // every row starts at a multiple of 16 bytes, and head_dim is a whole number of chunks
};

// threadIdx.x, read anew. A loop over tiles would otherwise keep in registers all that depends on it, for every tensor
// it loads: six registers that its products need.
__device__ inline int read_thread_index() {
  int index;
  asm volatile("mov.u32 %0, %%tid.x;\n" : "=r"(index));
  return index;
}

// A value that is the same in all lanes, in a uniform register: it, and what follows from it, costs the lanes none.
__device__ inline int uniform(int value) { return __reduce_max_sync(kWholeWarp, value); }

// A chunk element by element, for rows that do not lie in chunks. What is missing (count <= 0 or < 8) is zero.
template <typename T>
__device__ inline void copy_elements(std::uint32_t target, const T* source, int count) {
  std::uint32_t words[4] = {};
#pragma unroll
  for (int i = 0; i < kChunkWidth<T>; ++i) {
    if (i < count) {
      const std::uint32_t bits = __ldg(reinterpret_cast<const unsigned short*>(source) + i);
      words[i / 2] |= bits << (16 * (i % 2));
    }
  }
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(target), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// Begins to copy rows `first` ... `first + kRows - 1` into a tile; rows and channels that do not exist become zero. In
// chunks the copies are asynchronous: commit and wait. Otherwise they are done, for this thread, on return; a barrier
// makes both visible to the block.
//
// Whole tiles of rows in chunks are what the loops over tiles must be fast for. All else is one short loop, since its
// code lies in the middle of theirs and would fill the instruction cache: 0.8 KiB each time, unrolled it was 2.6 KiB.
template <int kRows, int kHeadDim, int kThreads, typename T>
__device__ inline void load_tile(std::uint32_t tile, const Rows<const T>& rows, int first) {
  constexpr int kChunks = kHeadDim / kChunkWidth<T>;  // of a row
  static_assert(kThreads % kChunks == 0 && kRows * kChunks % kThreads == 0, "a thread keeps its chunk");
  constexpr int kRowStep = kThreads / kChunks;
  const int thread = read_thread_index();
  const int row = thread / kChunks, chunk = thread % kChunks;
  const int channels = rows.head_dim - chunk * kChunkWidth<T>;
  const std::uint32_t first_target = tile + chunk_offset<kRows>(row, chunk);
  const auto target = [&](int i) {  // eight rows on, the pattern is the same
    return kRowStep % 8 == 0 ? first_target + i * kPanelRowBytes : tile + chunk_offset<kRows>(row + i, chunk);
  };
  const T* source = rows.data + (first + row) * rows.stride + (channels > 0 ? chunk * kChunkWidth<T> : 0);
  if (rows.in_chunks && first >= 0 && first + kRows <= rows.count) {
    constexpr int kCopies = kRows / kRowStep, kUnrolled = kCopies > 8 ? 4 : kCopies;  // an address is two registers
#pragma unroll kUnrolled
    for (int i = 0; i < kRows; i += kRowStep, source += kRowStep * rows.stride) {
      cp_async(target(i), source, channels > 0 ? kChunkBytes : 0);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kRows; i += kRowStep, source += kRowStep * rows.stride) {
    const bool inside = static_cast<unsigned>(first + row + i) < static_cast<unsigned>(rows.count) && channels > 0;
    if (rows.in_chunks) {
      cp_async(target(i), inside ? source : rows.data, inside ? kChunkBytes : 0);
    } else {
      copy_elements(target(i), source, inside ? channels : 0);
    }
  }
}

// ---- products of tiles ----------------------------------------------------------------------------------------------

// Results of kGroups x 16 rows and 8 * kTiles columns; see mma.cuh for what a lane holds of each tile.
template <int kGroups, int kTiles>
using Accumulator = float[kGroups][kTiles][4];

// scores += a b^T: 16 * kGroups rows of tile `a` from `a_row` on, times all kRowsB rows of tile `b`. kUnrolledSteps of
// 16 channels bound how far ahead operands are loaded.
template <typename T, int kHeadDim, int kRowsA, int kRowsB, int kGroups, int kUnrolledSteps = kHeadDim / 16>
__device__ inline void multiply_transposed(float (&scores)[kGroups][kRowsB / 8][4], std::uint32_t a, int a_row,
                                           std::uint32_t b) {
  const int lane = read_thread_index() % kWarpLanes;
  const std::uint32_t a_base = a + chunk_offset<kRowsA>(a_row + (lane & 15), lane >> 4);
  const std::uint32_t b_base = b + chunk_offset<kRowsB>((lane & 7) + ((lane >> 4) << 3), (lane >> 3) & 1);
#pragma unroll kUnrolledSteps
  for (int step = 0; step < kHeadDim / 16; ++step) {
    const std::uint32_t in_panel = (step & 3) << 5;
    const std::uint32_t a_panel = (step >> 2) * (kRowsA * kPanelRowBytes);
    const std::uint32_t b_panel = (step >> 2) * (kRowsB * kPanelRowBytes);
    std::uint32_t fragment[kGroups][4];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      ldmatrix(fragment[group], (a_base ^ in_panel) + (a_panel + group * (16 * kPanelRowBytes)));
    }
#pragma unroll
    for (int n = 0; n < kRowsB / 16; ++n) {
      std::uint32_t columns[4];
      ldmatrix(columns, (b_base ^ in_panel) + (b_panel + n * (16 * kPanelRowBytes)));
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        mma<T>(scores[group][2 * n], fragment[group], columns[0], columns[1]);
        mma<T>(scores[group][2 * n + 1], fragment[group], columns[2], columns[3]);
      }
    }
  }
}

// result += a b: `a` holds columns 16 * step ... of a 16 * kGroups row operand in registers, b the rows of the same
// numbers of a tile. kClamped: of b what is finite, because some of `a` are zeros in place of what is hidden.
template <typename T, int kHeadDim, int kRowsB, int kGroups, bool kClamped = false>
__device__ inline void multiply_step(float (&result)[kGroups][kHeadDim / 8][4], const std::uint32_t (&a)[kGroups][4],
                                     std::uint32_t b, int step) {
  const int lane = read_thread_index() % kWarpLanes;
  const std::uint32_t b_base = b + chunk_offset<kRowsB>(lane & 15, lane >> 4);
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
    for (int group = 0; group < kGroups; ++group) {
      mma<T>(result[group][2 * n], a[group], columns[0], columns[1]);
      mma<T>(result[group][2 * n + 1], a[group], columns[2], columns[3]);
    }
  }
}

// Whether a tile of kBytes holds finite numbers only; the same in all lanes of the warp.
template <typename T, int kBytes>
__device__ inline bool is_finite(std::uint32_t tile) {
  std::uint32_t sum = 0;
  const std::uint32_t first = tile + read_thread_index() % kWarpLanes * kChunkBytes;
#pragma unroll 4
  for (int at = 0; at < kBytes; at += kWarpLanes * kChunkBytes) {
    std::uint32_t words[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(first + at)
                 : "memory");
#pragma unroll
    for (const std::uint32_t word : words) look_at<T>(sum, word);
  }
  return !__any_sync(kWholeWarp, (sum & 0x7FFF7FFFu) != 0);
}

// result += b for the numbers of a tile that are not finite, in the rows that see them: what a clamped product has left
// out, of weights that are not negative. `rows` are those of `hide`; `key` is row 0 of the tile.
template <typename T, int kHeadDim, int kRowsB, int kGroups, typename R>
__device__ inline void add_not_finite(float (&result)[kGroups][kHeadDim / 8][4], const R* rows, int key,
                                      std::uint32_t b) {
  const int lane = read_thread_index() % kWarpLanes;
#pragma unroll 1
  for (int row = 0; row < kRowsB; ++row) {
    bool sees[kGroups][2];
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const R& own = rows[group * 16 + half * 8 + (lane >> 2)];
        sees[group][half] = own.first <= key + row && key + row < own.end;
      }
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      std::uint32_t bits;
      asm volatile("ld.shared.b32 %0, [%1];\n"
                   : "=r"(bits)
                   : "r"(b + chunk_offset<kRowsB>(row, n) + ((lane & 3) << 2))
                   : "memory");
      Pair<T> pair;
      memcpy(&pair, &bits, sizeof pair);
      const float2 numbers = to_floats(pair);
      const float left = isfinite(numbers.x) ? 0.0f : numbers.x, right = isfinite(numbers.y) ? 0.0f : numbers.y;
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (!sees[group][half]) continue;
          result[group][n][2 * half] += left;
          result[group][n][2 * half + 1] += right;
        }
      }
    }
  }
}

// Columns 16 * step ... 16 * step + 15 of a result, as the A operand of the next product.
template <typename T, int kTiles>
__device__ inline void pack_operand(std::uint32_t (&a)[4], const float (&values)[kTiles][4], int step) {
  const float (&left)[4] = values[2 * step];
  const float (&right)[4] = values[2 * step + 1];
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

// Writes 16 * kGroups rows of a result, times `factor` of their row ([0]: row g, [1]: row g + 8), to rows `first` ...
// of `target`, through rows `tile_row` ... of a tile that this warp alone uses.
template <typename T, int kHeadDim, int kRowsTile, int kGroups>
__device__ inline void store_rows(const Rows<T>& target, int first, const float (&values)[kGroups][kHeadDim / 8][4],
                                  const float (&factor)[kGroups][2], std::uint32_t tile, int tile_row) {
  constexpr int kChunks = kHeadDim / kChunkWidth<T>;
  constexpr int kRowStep = kWarpLanes / kChunks;
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
  __syncwarp();  // the other lanes' last reads of these rows are done
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float (&pair)[4] = values[group][n];
        const std::uint32_t bits =
            pack<T>(pair[2 * half] * factor[group][half], pair[2 * half + 1] * factor[group][half]);
        const int row = tile_row + group * 16 + half * 8 + (lane >> 2);
        asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(tile + chunk_offset<kRowsTile>(row, n) + ((lane & 3) << 2)),
                     "r"(bits)
                     : "memory");
      }
    }
  }
  __syncwarp();  // the rows are complete
  const int chunk = lane % kChunks;
  const int channels = target.head_dim - chunk * kChunkWidth<T>;
#pragma unroll 1
  for (int row = lane / kChunks; row < 16 * kGroups; row += kRowStep) {
    if (first + row >= target.count || channels <= 0) continue;
    Chunk<T> bits;
    uint4 words;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(tile + chunk_offset<kRowsTile>(tile_row + row, chunk))
                 : "memory");
    memcpy(&bits, &words, sizeof bits);
    T* row_data = target.data + (first + row) * target.stride + chunk * kChunkWidth<T>;
    if (target.in_chunks) {
      store<Access::kChunk>(row_data, bits, channels);
    } else {
      const T* elements = reinterpret_cast<const T*>(&bits);
#pragma unroll
      for (int i = 0; i < kChunkWidth<T>; ++i) {
        if (i < channels) row_data[i] = elements[i];
      }
    }
  }
}

// ---- which keys a row sees ------------------------------------------------------------------------------------------

inline constexpr int kUnlimited = INT_MAX;
// Bounded softmax takes 2^(score * scale2) as it is. The numbers a row may sum are then between 2^-126 and 2^126 in
// bfloat16 and float32 (docs/attention.md#bounded-softmax). float16 is normal from 2^-14 on: a row whose own key has
// the smallest weight, e^-7 = 2^-10, keeps its neighbours, which a bias makes smaller still, to 4 bits less than the
// own key.
template <typename T>
inline constexpr float kMaxBound = std::is_same_v<T, __half> ? 7.0f : 40.0f;

// A head's constants. `window`: keys at this distance or farther together hold less than 2^-24 of a row's softmax if
// the row sees its own key: exp(2 bound - slope * distance), a geometric sum (docs/attention.md#windows).
struct Head {
  float slope;  // per key, natural units
  float bound;  // on |softmax_scale <q, k>|; infinite when unknown
  int window;   // in keys; kUnlimited without a bound or a bias
};

__device__ inline Head describe_head(const AttentionParams& params, int head) {
  Head result{0.0f, __int_as_float(0x7f800000), kUnlimited};
  if (params.alibi_slopes != nullptr) result.slope = __ldg(params.alibi_slopes + head);
  if (params.logit_bound == nullptr) return result;
  const float bound = __ldg(params.logit_bound + head);
  if (bound >= 0.0f) result.bound = bound;  // a NaN promises nothing
  // Rounded up and one more: float32 need not be exact, keeping a key too many is harmless.
  const float window = ceilf((2.0f * bound + 16.6355324f) / result.slope) + 1.0f;  // 24 ln 2
  if (result.slope > 0.0f && window < 1e9f) result.window = static_cast<int>(window);
  return result;
}

// One query row of one batch entry: it sees keys first <= j < end. `position` is the key it is aligned with. A row that
// does not exist sees everything: its result is dropped, and it must not make others mask.
struct Row {
  int position, first, end;
  __device__ bool empty() const { return first >= end; }
  __device__ bool sees_itself() const { return first <= position && position < end; }
};

__device__ inline Row describe_row(const AttentionParams& params, int batch, int query) {
  Row row;
  row.position = query + (params.seqlen_k - params.seqlen_q);
  row.first = 0;
  row.end = params.seqlen_k;
  if (query >= params.seqlen_q) return row;
  if (params.key_start != nullptr) {
    row.first = max(__ldg(params.key_start + static_cast<std::int64_t>(batch) * params.seqlen_q + query), 0);
  }
  if (params.causal) row.end = min(row.end, row.position + 1);
  if (row.empty()) row.first = kUnlimited, row.end = 0;  // masked in every tile
  return row;
}

// What `hide` needs of a Row.
struct KeySpan {
  int first, end;
};

// Keys that some of a set of rows see (`begin`, `end`: tiles outside are skipped; the window is taken off), and keys
// that all of them see (`plain_begin`, `plain_end`: tiles inside need no mask).
struct Reach {
  int begin, end, plain_begin, plain_end;

  __device__ static Reach of(const Row& row, bool exists, int window) {
    if (!exists) return {kUnlimited, 0, 0, kUnlimited};
    Reach reach{row.first, row.end, row.first, row.end};
    if (!row.empty() && row.sees_itself() && window != kUnlimited) {
      reach.begin = max(reach.begin, row.position - window + 1);
      reach.end =
          min(reach.end,
              static_cast<int>(min(static_cast<long long>(row.position) + window, static_cast<long long>(kUnlimited))));
    }
    return reach;
  }

  // The reach of the rows of all lanes together, in all lanes.
  __device__ Reach of_warp() const {
    return {__reduce_min_sync(kWholeWarp, begin), __reduce_max_sync(kWholeWarp, end),
            __reduce_max_sync(kWholeWarp, plain_begin), __reduce_min_sync(kWholeWarp, plain_end)};
  }

  __device__ bool touches(int key, int count) const { return key < end && key + count > begin; }
  __device__ bool is_plain(int key, int count) const { return plain_begin <= key && key + count <= plain_end; }
};

// ---- the bias -------------------------------------------------------------------------------------------------------

// Sets the accumulators of a product to -slope * (position - key) / softmax_scale, so that the bias costs nothing after
// it (`raw_slope` is slope / softmax_scale): right for keys at or left of the diagonal; `mirror_bias` does the others.
// A lane holds rows r and r + 8 of each group; `position` is that of its first row r of group 0, and `key` the key of
// its first column.
//
// Both rows share one value, -slope * (position + 8 - key): adding a constant to a row leaves its softmax unchanged,
// and for row r the constant is -8 slope. `lowered_by` below undoes it in the log-sum-exp. A reference shared by more
// rows would underflow: 127 rows of slope 0.7 are 130 bits.
template <int kGroups, int kTiles>
__device__ inline void seed_bias(float (&scores)[kGroups][kTiles][4], float raw_slope, int position, int key) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const float distance = static_cast<float>(key - (position + group * 16 + 8));  // exact: formed in integers
    const float base = raw_slope * distance;
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        scores[group][n][i] = scores[group][n][i + 2] = fmaf(raw_slope, static_cast<float>(8 * n + i), base);
      }
    }
  }
}

// By how many rows the bias of row r (half 0) and r + 8 (half 1) was taken too far away.
__device__ constexpr float lowered_by(int half) { return half == 0 ? 8.0f : 0.0f; }

// Corrects, after the product, what `seed_bias` set for keys right of the diagonal: there the bias falls again.
template <int kGroups, int kTiles>
__device__ inline void mirror_bias(float (&scores)[kGroups][kTiles][4], float raw_slope, int position, int key) {
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float distance = static_cast<float>(key - (position + group * 16 + half * 8));
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float beyond = fmaxf(distance + static_cast<float>(8 * n + i), 0.0f);
          float& score = scores[group][n][2 * half + i];
          score = fmaf(-2.0f * raw_slope, beyond, score);
        }
      }
    }
  }
}

// Hides, after the product, what a row does not see: a NaN in a hidden key must not survive. `rows` are those of the
// block's tile in shared memory, from the warp's first row on, each a Row or a KeySpan.
//
// `gradients`: of the weights, or nothing; what is hidden becomes 0.
template <int kGroups, int kTiles, typename R, typename... Gradients>
__device__ inline void hide(float (&scores)[kGroups][kTiles][4], const R* rows, int key, Gradients&... gradients) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpLanes;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const R& row = rows[group * 16 + half * 8 + (lane >> 2)];
      const int first = row.first - key, end = row.end - key;
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int column = 8 * n + i;
          if (column < first || column >= end) {
            scores[group][n][2 * half + i] = -__int_as_float(0x7f800000);
            ((gradients[group][n][2 * half + i] = 0.0f), ...);
          }
        }
      }
    }
  }
}

}  // namespace andromeda::cuda
