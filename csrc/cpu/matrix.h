// Small float32 matrices in scratch memory: the register-blocked product that attention is built from. operands.h makes
// operands of it from tensors.
//
//   c (rows x kCols)  =  or  +=  a (rows x depth)  *  b (depth x kCols)
//
//   a   read one number at a time and broadcast, so it may lie by rows or, transposed, by columns
//   b   kCols consecutive numbers per step: of a row of a tensor or matrix, or of a panel (operands.h)
//   c   kRows x kCols numbers in registers; every vector of b is used kRows times, every number of a twice
//
// All strides are run-time numbers, in elements. Rows in scratch memory are row_stride() apart: a multiple of the page
// size, or of the stride between sets of a cache, would make the rows evict each other.
#pragma once

#include <cstdint>

#include "andromeda/integers.h"
#include "scratch.h"
#include "simd.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRows = 12;  // 24 accumulators, 2 vectors of b, 1 of a: 27 of 32 registers
#else
inline constexpr int kRows = 6;  // 12 accumulators: 15 of 16 registers
#endif
inline constexpr int kFewRows = kRows / 3;  // the last rows of a matrix are computed in blocks of this many
inline constexpr int kCols = 2 * kLanes;

// The distance between rows of `width` numbers in scratch memory, of which round_up(width, kCols) can be read.
inline std::int64_t row_stride(int width) { return round_up(width, kCols) + kLanes; }

// Element (row, step) of a lies at a[row * stride + step], or at a[step * stride + row].
enum class Order { kByRows, kByColumns };
enum class Result { kSet, kAdd };

// Memory that a later product reads: a product fetches two cache lines of it in every step, `stride` bytes apart.
struct Prefetch {
  const char* next;
  std::int64_t stride;
};

// Divides the prefetch of a tensor's rows, piece by piece, among the products before the one that reads them.
class Prefetcher {
 public:
  Prefetcher() = default;
  template <typename T>
  Prefetcher(const T* x, std::int64_t stride, int rows, int width)
      : base_(reinterpret_cast<const char*>(x)), stride_(stride * sizeof(T)), rows_(rows) {
    const std::int64_t bytes = width * sizeof(T);
    pieces_ = static_cast<int>(ceil_div(bytes, kPiece));
    if (stride_ != bytes) return;
    rows_ = static_cast<int>(ceil_div(bytes * rows, kPiece));  // dense: one row of memory
    stride_ = kPiece;
    pieces_ = 1;
  }
  // The next piece, for a product of so many steps. When all are handed out, `cached`, which costs nothing to fetch.
  Prefetch take(int steps, const void* cached) {
    if (piece_ >= pieces_) return {static_cast<const char*>(cached), 0};
    const Prefetch next{base_ + row_ * stride_ + piece_ * kPiece, stride_};
    row_ += steps;
    if (row_ >= rows_) {
      row_ = 0;
      ++piece_;
    }
    return next;
  }

 private:
  static constexpr int kPiece = 128;  // two cache lines
  const char* base_ = nullptr;
  std::int64_t stride_ = 0;
  int rows_ = 0, pieces_ = 0, row_ = 0, piece_ = 0;
};

// Not inlined: one copy of each variant serves every product, and no caller's variables compete for its registers.
// B is the type in which b is stored: half precision is converted in registers.
template <int kBlockRows, Order kOrder, Result kResult, typename B>
__attribute__((noinline)) void multiply_block(const float* a, std::int64_t a_stride, const B* b, std::int64_t b_stride,
                                              float* c, std::int64_t c_stride, int depth, Prefetch prefetch) {
  Vec sum[kBlockRows][2] = {};
  // Four pointers to three rows each: an address is then a base plus 0, 1 or 2 strides, which x86 computes in a load.
  const float* rows[4] = {a, a + 3 * a_stride, a + 6 * a_stride, a + 9 * a_stride};
  do {
    const Vec b0 = load(b), b1 = load(b + kLanes);
    __builtin_prefetch(prefetch.next, 0, 2);
    __builtin_prefetch(prefetch.next + 64, 0, 2);
    prefetch.next += prefetch.stride;
#pragma GCC unroll 12
    for (int row = 0; row < kBlockRows; ++row) {
      const Vec x = broadcast(kOrder == Order::kByRows ? rows[row / 3][row % 3 * a_stride] : a[row]);
      sum[row][0] += x * b0;
      sum[row][1] += x * b1;
    }
    a += a_stride;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) ++rows[i];
    b += b_stride;
  } while (--depth > 0);
#pragma GCC unroll 12
  for (int row = 0; row < kBlockRows; ++row, c += c_stride) {
    // Added at the end: the products can start before c has arrived.
    store(c, kResult == Result::kAdd ? load(c) + sum[row][0] : sum[row][0]);
    store(c + kLanes, kResult == Result::kAdd ? load(c + kLanes) + sum[row][1] : sum[row][1]);
  }
}

// A product of up to kRows rows. Their number is rounded up to a multiple of kFewRows, so a and c need room for that.
template <Order kOrder, Result kResult, typename B>
inline void multiply_rows(const float* a, std::int64_t a_stride, const B* b, std::int64_t b_stride, float* c,
                          std::int64_t c_stride, int rows, int depth, Prefetch prefetch) {
  if (depth == 0) {  // heads without channels; the loop of multiply_block runs at least once
    for (int row = 0; kResult == Result::kSet && row < rows; ++row) clear(c + row * c_stride, kCols);
    return;
  }
  if (rows > 2 * kFewRows) {
    multiply_block<kRows, kOrder, kResult, B>(a, a_stride, b, b_stride, c, c_stride, depth, prefetch);
    return;
  }
  for (int row = 0; row < rows; row += kFewRows)
    multiply_block<kFewRows, kOrder, kResult, B>(a + row * (kOrder == Order::kByRows ? a_stride : 1), a_stride, b,
                                                 b_stride, c + row * c_stride, c_stride, depth, prefetch);
}

template <Order kOrder, Result kResult, typename B>
inline void multiply_rows(const float* a, std::int64_t a_stride, const B* b, std::int64_t b_stride, float* c,
                          std::int64_t c_stride, int rows, int depth) {
  const Prefetch nothing{reinterpret_cast<const char*>(b), 0};
  multiply_rows<kOrder, kResult>(a, a_stride, b, b_stride, c, c_stride, rows, depth, nothing);
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
