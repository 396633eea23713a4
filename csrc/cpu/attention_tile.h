// The parts that attention_forward.cpp and attention_backward.cpp share: which keys a query row sees, packed operands,
// and the register-blocked product that everything is built from.
//
//                 kTileK keys                A product computes kRows x kCols outputs in registers:
//            +-------------------+             a: element (row, step) at a[row * kRowStride + step * kStepStride],
//   kTileQ   |  scores, then     |                read one at a time and broadcast
//   queries  |  probabilities    |             b: a panel, kCols consecutive columns for every step
//            +-------------------+           Panels make both streams contiguous, whatever the tensor's strides.
//
// Logits are in base 2 inside a kernel: softmax_scale * log2(e) is folded into q, log2(e) into the slopes.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "andromeda/attention.h"
#include "simd.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRows = 12;  // 24 accumulators, 2 vectors of b, 1 of a: 27 of 32 registers
#else
inline constexpr int kRows = 6;  // 12 accumulators: 15 of 16 registers
#endif
inline constexpr int kCols = 2 * kLanes;

inline constexpr int kTileQ = 96;
inline constexpr int kTileK = 96;
static_assert(kTileQ % kRows == 0 && kTileK % kRows == 0, "tiles are whole register blocks");
static_assert(kTileK % kCols == 0, "a tile of scores is whole panels");

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Uninitialised floats, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(std::int64_t count)
      : data_(static_cast<float*>(std::aligned_alloc(64, round_up(larger(count, 1) * sizeof(float), 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  float* get() const { return data_; }

 private:
  float* data_;
};

inline void clear(float* x, std::int64_t count) { std::memset(x, 0, count * sizeof(float)); }

// One T per thread, made by the constructor that takes the other arguments.
template <typename T>
class Scratch {
 public:
  template <typename... Args>
  explicit Scratch(int num_threads, const Args&... args)
      : items_(static_cast<T*>(std::aligned_alloc(64, round_up(larger(num_threads, 1) * sizeof(T), 64)))) {
    if (items_ == nullptr) throw std::bad_alloc();
    try {
      for (; count_ < larger(num_threads, 1); ++count_) new (items_ + count_) T(args...);
    } catch (...) {
      destroy();
      throw;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { destroy(); }
  T& operator[](int worker) const { return items_[worker]; }

 private:
  void destroy() {
    while (count_ > 0) items_[--count_].~T();
    std::free(items_);
  }
  T* items_;
  int count_ = 0;
};

// ---- products -------------------------------------------------------------------------------------------------------

// c (kRows x kCols, row stride kRowC) = or += a (kRows x depth) * panel b (depth x kCols).
template <int kRowStride, int kStepStride, int kRowC, bool kAccumulate>
inline void multiply_block(const float* a, const float* b, float* c, int depth) {
  Vec sum[kRows][2];
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    sum[row][0] = kAccumulate ? load(c + row * kRowC) : Vec{};
    sum[row][1] = kAccumulate ? load(c + row * kRowC + kLanes) : Vec{};
  }
  for (int step = 0; step < depth; ++step, a += kStepStride, b += kCols) {
    const Vec b0 = load(b), b1 = load(b + kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < kRows; ++row) {
      const Vec x = broadcast(a[row * kRowStride]);
      sum[row][0] += x * b0;
      sum[row][1] += x * b1;
    }
  }
#pragma GCC unroll 12
  for (int row = 0; row < kRows; ++row) {
    store(c + row * kRowC, sum[row][0]);
    store(c + row * kRowC + kLanes, sum[row][1]);
  }
}

// Scores: tile (kTileQ x kTileK) = rows packed by pack_rows (.. x head_dim) * keys packed by pack_columns.
inline void multiply_scores(const float* rows, const float* columns, float* tile, int num_rows, int num_keys,
                            int head_dim) {
  for (int key = 0; key < num_keys; key += kCols)
    for (int row = 0; row < num_rows; row += kRows)
      multiply_block<1, kRows, kTileK, false>(rows + row * head_dim, columns + key * head_dim,
                                              tile + row * kTileK + key, head_dim);
}

// out (kTileQ x head_dim panels) += tile (kTileQ x kTileK) * values packed by pack_panels.
inline void multiply_values(const float* tile, const float* panels, float* out, int num_rows, int num_keys,
                            int num_panels) {
  for (int panel = 0; panel < num_panels; ++panel)
    for (int row = 0; row < num_rows; row += kRows)
      multiply_block<kTileK, 1, kCols, true>(tile + row * kTileK, panels + panel * kTileK * kCols,
                                             out + (panel * kTileQ + row) * kCols, num_keys);
}

// out (kTileK x head_dim panels) += transposed tile (kTileK x kTileQ) * queries packed by pack_panels.
inline void multiply_transposed(const float* tile, const float* panels, float* out, int num_rows, int num_keys,
                                int num_panels) {
  for (int panel = 0; panel < num_panels; ++panel)
    for (int key = 0; key < num_keys; key += kRows)
      multiply_block<1, kTileK, kCols, true>(tile + key, panels + panel * kTileQ * kCols,
                                             out + (panel * kTileK + key) * kCols, num_rows);
}

// ---- packing: any dtype and strides in, zero-padded float32 out -----------------------------------------------------

// One row of head_dim numbers as float32, zero up to a multiple of kCols.
template <typename T>
inline void read_row(const T* x, int head_dim, float factor, float* row) {
  int channel = 0;
  for (; channel + kLanes <= head_dim; channel += kLanes) store(row + channel, load(x + channel) * factor);
  if (channel < head_dim) {
    store(row + channel, load_first(x + channel, head_dim - channel) * factor);
    channel += kLanes;
  }
  for (const int end = static_cast<int>(round_up(head_dim, kCols)); channel < end; channel += kLanes)
    store(row + channel, Vec{});
}

// The left operand of a product over channels: blocks of kRows rows, (head_dim, kRows) each.
inline void place_in_rows(const float* row, int index, int head_dim, float* packed) {
  float* block = packed + (index / kRows) * kRows * head_dim + index % kRows;
  for (int channel = 0; channel < head_dim; ++channel) block[channel * kRows] = row[channel];
}

// The right operand of a product over channels: panels of kCols rows, (head_dim, kCols) each.
inline void place_in_columns(const float* row, int index, int head_dim, float* packed) {
  float* panel = packed + (index / kCols) * kCols * head_dim + index % kCols;
  for (int channel = 0; channel < head_dim; ++channel) panel[channel * kCols] = row[channel];
}

// The right operand of a product over rows: panels of kCols channels, (tile_rows, kCols) each.
inline void place_in_panels(const float* row, int index, int tile_rows, int num_panels, float* packed) {
  for (int panel = 0; panel < num_panels; ++panel) {
    float* target = packed + (panel * tile_rows + index) * kCols;
    store(target, load(row + panel * kCols));
    store(target + kLanes, load(row + panel * kCols + kLanes));
  }
}

// One row of a matrix in panels, back into a tensor.
template <typename T>
inline void write_row(const float* panels, std::int64_t index, int tile_rows, int head_dim, float factor, T* x) {
  for (int channel = 0; channel < head_dim; channel += kLanes) {
    const Vec value = load(panels + (channel / kCols * tile_rows + index) * kCols + channel % kCols) * factor;
    const int count = static_cast<int>(smaller(kLanes, head_dim - channel));
    count == kLanes ? store(x + channel, value) : store_first(x + channel, value, count);
  }
}

// ---- exponential ----------------------------------------------------------------------------------------------------

// 2^x, relative error below 2e-7. Everything below 2^-100 becomes exactly 0: relative to a row's largest weight it is
// beyond float32, and its products would be denormal numbers, which cost a hundred cycles each. A NaN stays a NaN.
inline Vec exp2(Vec x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  x = x < -100.0f ? broadcast(-127.0f) : x;
  const Vec shifted = x + kRound;
  const Vec fraction = x - (shifted - kRound);  // in [-0.5, 0.5]
  Vec p = broadcast(1.5403530393381608e-4f);
  p = p * fraction + 1.3333558146428443e-3f;
  p = p * fraction + 9.6181291076284772e-3f;
  p = p * fraction + 5.5504108664821580e-2f;
  p = p * fraction + 2.4022650695910071e-1f;
  p = p * fraction + 6.9314718055994531e-1f;
  p = p * fraction + 1.0f;
  // The exponent field of 2^round(x); for round(x) = -127 it is 0, and so is the float.
  return p * (Vec)(((IntVec)shifted + 127) << 23);
}

// ---- which keys a row sees ------------------------------------------------------------------------------------------

// A head's constants. `window`: keys at this distance or farther together hold less than 2^-24 of a row's softmax
// (gpu_kernels 1.5: exp(2 bound - slope * distance), a geometric sum against the row's own key).
struct Head {
  float slope;          // base 2
  std::int64_t window;  // in tokens; kUnlimited without a bound or a bias
  bool bounded;         // the softmax needs no running maximum: |logit| <= kLargestBound
};

inline constexpr std::int64_t kUnlimited = std::int64_t{1} << 40;
inline constexpr float kLargestBound = 40.0f;  // gpu_kernels 1.3: keeps every weight and sum inside float32

inline Head describe_head(const AttentionParams& params, int head) {
  const float slope = params.alibi_slopes == nullptr ? 0.0f : params.alibi_slopes[head];
  Head result{slope * kLog2E, kUnlimited, false};
  if (params.logit_bound == nullptr) return result;
  const double bound = params.logit_bound[head];
  result.bounded = bound <= kLargestBound;  // false for NaN
  const double window = std::ceil((2.0 * bound + 24.0 * 0.69314718055994530942) / slope);
  if (slope > 0.0f && window < static_cast<double>(kUnlimited)) result.window = static_cast<std::int64_t>(window);
  return result;
}

// One query row: it sees keys first <= j < end, and `position` is the key it is aligned with.
struct Row {
  std::int64_t position, first, end;
  // Whether the row's own key is visible: then its weight bounds the softmax sum from below, which both the window and
  // the softmax without a running maximum rely on. Without a bias any visible key does as well.
  bool sees_itself() const { return first <= position && position < end; }
};

inline Row describe_row(const AttentionParams& params, int batch, std::int64_t query) {
  Row row;
  row.position = query + params.seqlen_k - params.seqlen_q;
  const std::int64_t start =
      params.key_start == nullptr ? 0 : params.key_start[static_cast<std::int64_t>(batch) * params.seqlen_q + query];
  row.first = larger(start, 0);
  row.end = params.causal ? smaller(row.position + 1, params.seqlen_k) : params.seqlen_k;
  return row;
}

// Keys that one head's rows [query, query + count) need, as tiles [begin, end) of kTileK keys. Forward and backward
// both ask here, so that the gradient is that of the computed function.
struct TileRange {
  std::int64_t begin, end;
};

inline TileRange visible_tiles(const AttentionParams& params, const Head& head, int batch, std::int64_t query,
                               std::int64_t count) {
  std::int64_t first = params.seqlen_k, end = 0;
  for (std::int64_t i = query; i < query + count; ++i) {
    const Row row = describe_row(params, batch, i);
    if (row.first >= row.end) continue;
    const std::int64_t window = row.sees_itself() ? head.window : kUnlimited;
    first = smaller(first, larger(row.first, row.position - window + 1));
    end = larger(end, smaller(row.end, row.position + window));
  }
  if (first >= end) return {0, 0};
  return {first / kTileK, ceil_div(end, kTileK)};
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
