// Small float32 matrices in scratch memory: the register-blocked product that attention is built from, and the ways a
// tensor of any dtype and strides becomes an operand of it.
//
//   c (rows x kCols)  =  or  +=  a (rows x depth)  *  b (depth x kCols)
//
//   a   read one number at a time and broadcast, so it may lie by rows or, transposed, by columns
//   b   kCols consecutive numbers per step: of a row of a tensor or matrix, or of a panel made by the functions below
//   c   kRows x kCols numbers in registers; every vector of b is used kRows times, every number of a twice
//
// All strides are run-time numbers, in elements. Rows in scratch memory are row_stride() apart: a multiple of the page
// size, or of the stride between sets of a cache, would make the rows evict each other.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "rows.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRows = 12;  // 24 accumulators, 2 vectors of b, 1 of a: 27 of 32 registers
#else
inline constexpr int kRows = 6;  // 12 accumulators: 15 of 16 registers
#endif
inline constexpr int kFewRows = kRows / 3;  // what is left over is computed by blocks of this many rows
inline constexpr int kCols = 2 * kLanes;

inline std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }
inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

// Between rows of `width` numbers in scratch memory, of which round_up(width, kCols) are there to be read.
inline std::int64_t row_stride(int width) { return round_up(width, kCols) + kLanes; }

// Uninitialised memory of plain numbers, aligned to a cache line.
template <typename T>
class Memory {
 public:
  explicit Memory(std::int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, round_up(larger(count, 1) * sizeof(T), 64)))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() { std::free(data_); }
  T* get() const { return data_; }

 private:
  T* data_;
};
using Buffer = Memory<float>;

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

enum class Order {
  kByRows,
  kByColumns
};  // element (row, step) of a at a[row * stride + step], or with the two swapped
enum class Result { kSet, kAdd };

// Memory that a later product will read, asked for while this one computes: two cache lines every step, `stride` bytes
// apart.
struct Ahead {
  const char* next;
  std::int64_t stride;
};

// Rows of a tensor, to be asked for piece by piece.
class Foresight {
 public:
  Foresight() = default;
  template <typename T>
  Foresight(const T* x, std::int64_t stride, int rows, int width)
      : base_(reinterpret_cast<const char*>(x)), stride_(stride * sizeof(T)), rows_(rows) {
    const std::int64_t bytes = width * sizeof(T);
    pieces_ = static_cast<int>(ceil_div(bytes, kPiece));
    if (stride_ != bytes) return;
    rows_ = static_cast<int>(ceil_div(bytes * rows, kPiece));  // dense: one row of memory
    stride_ = kPiece;
    pieces_ = 1;
  }
  // What a product of so many steps can ask for; `idle` is memory at hand, for when nothing is left.
  Ahead take(int steps, const void* idle) {
    if (piece_ >= pieces_) return {static_cast<const char*>(idle), 0};
    const Ahead ahead{base_ + row_ * stride_ + piece_ * kPiece, stride_};
    row_ += steps;
    if (row_ >= rows_) {
      row_ = 0;
      ++piece_;
    }
    return ahead;
  }

 private:
  static constexpr int kPiece = 128;  // two cache lines
  const char* base_ = nullptr;
  std::int64_t stride_ = 0;
  int rows_ = 0, pieces_ = 0, row_ = 0, piece_ = 0;
};

// Not inlined: one copy of each variant serves every product, and the compiler allocates its registers in peace.
// B is how b is stored: numbers of half precision are converted in registers.
template <int kBlockRows, Order kOrder, Result kResult, typename B>
__attribute__((noinline)) void multiply_block(const float* a, std::int64_t a_stride, const B* b, std::int64_t b_stride,
                                              float* c, std::int64_t c_stride, int depth, Ahead ahead) {
  Vec sum[kBlockRows][2] = {};
  // Four pointers of three rows each: an address is then a base plus 0, 1 or 2 strides, which x86 computes in the load.
  const float* rows[4] = {a, a + 3 * a_stride, a + 6 * a_stride, a + 9 * a_stride};
  do {
    const Vec b0 = load(b), b1 = load(b + kLanes);
    __builtin_prefetch(ahead.next, 0, 2);
    __builtin_prefetch(ahead.next + 64, 0, 2);
    ahead.next += ahead.stride;
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

// As many rows as asked for, up to kRows; rounded up to a multiple of kFewRows, which a and c must have room for.
template <Order kOrder, Result kResult, typename B>
inline void multiply_rows(const float* a, std::int64_t a_stride, const B* b, std::int64_t b_stride, float* c,
                          std::int64_t c_stride, int rows, int depth, Ahead ahead) {
  if (depth == 0) {  // heads without channels; the loop of multiply_block runs at least once
    for (int row = 0; kResult == Result::kSet && row < rows; ++row) clear(c + row * c_stride, kCols);
    return;
  }
  if (rows > 2 * kFewRows) {
    multiply_block<kRows, kOrder, kResult, B>(a, a_stride, b, b_stride, c, c_stride, depth, ahead);
    return;
  }
  for (int row = 0; row < rows; row += kFewRows)
    multiply_block<kFewRows, kOrder, kResult, B>(a + row * (kOrder == Order::kByRows ? a_stride : 1), a_stride, b,
                                                 b_stride, c + row * c_stride, c_stride, depth, ahead);
}

template <Order kOrder, Result kResult, typename B>
inline void multiply_rows(const float* a, std::int64_t a_stride, const B* b, std::int64_t b_stride, float* c,
                          std::int64_t c_stride, int rows, int depth) {
  const Ahead nothing{reinterpret_cast<const char*>(b), 0};
  multiply_rows<kOrder, kResult>(a, a_stride, b, b_stride, c, c_stride, rows, depth, nothing);
}

// ---- numbers that are not finite ------------------------------------------------------------------------------------
//
// A product over keys or queries multiplies what a row does not see by 0, and 0 * NaN is a NaN. So where a product sums
// over the rows of an operand, the operand is finite: numbers that are not are taken for 0, and added afterwards, by
// add_scaled(), to the sums that do see them.

// Notices numbers that are not finite, for two operations a vector.
class Noticed {
 public:
  void look_at(Vec x) { bits_ |= (IntVec)(x * 0.0f); }  // a zero of either sign, or a NaN
  bool any() const { return ANDROMEDA_ISA::any(bits_ & 0x7f800000); }

 private:
  IntVec bits_{};
};

inline IntVec is_finite(Vec x) { return ((IntVec)x & 0x7f800000) != 0x7f800000; }

// Numbers that are not finite become 0, and are kept in `rest`, which is 0 elsewhere. Returns whether there are any.
inline bool set_apart(float* row, int width, float* rest) {
  Noticed noticed;
  for (int channel = 0; channel < width; channel += kLanes) {
    const Vec x = load(row + channel);
    noticed.look_at(x);
    store(row + channel, select(is_finite(x), x, Vec{}));
    store(rest + channel, select(is_finite(x), Vec{}, x));
  }
  return noticed.any();
}

inline void add_scaled(float* sums, float weight, const float* row, int width) {
  for (int channel = 0; channel < width; channel += kLanes)
    store(sums + channel, load(sums + channel) + weight * load(row + channel));
}

// ---- operands: any dtype and strides in, zero-padded float32 out ----------------------------------------------------

// One row of `width` numbers as float32, times `factor`, zero up to a multiple of kCols.
template <typename T>
inline void read_row(const T* x, int width, float factor, float* row, Noticed& noticed) {
  const auto put = [&](int channel, Vec numbers) {
    noticed.look_at(numbers);
    store(row + channel, numbers);
  };
  int channel = 0;
  for (; channel + kLanes <= width; channel += kLanes) put(channel, load(x + channel) * factor);
  if (channel < width) {
    put(channel, load_first(x + channel, width - channel) * factor);
    channel += kLanes;
  }
  for (const int end = static_cast<int>(round_up(width, kCols)); channel < end; channel += kLanes)
    store(row + channel, Vec{});
}

template <typename T>
inline void read_row(const T* x, int width, float factor, float* row) {
  Noticed ignored;
  read_row(x, width, factor, row, ignored);
}

template <typename T>
inline void write_row(const float* row, int width, float factor, T* x) {
  int channel = 0;
  for (; channel + kLanes <= width; channel += kLanes) store(x + channel, load(row + channel) * factor);
  if (channel < width) store_first(x + channel, load(row + channel) * factor, width - channel);
}

// Up to kCols rows of a tensor become a panel (width, kCols) of columns, zero behind the last row.
template <typename T>
inline void pack_columns(const T* x, std::int64_t stride, int rows, int width, float* panel) {
  constexpr int kChunk = 64;
  for (int half = 0; half < kCols; half += kLanes) {
    const int count = rows - half;
    for (int channel = 0; channel < width; channel += kChunk) {
      const int channels = static_cast<int>(smaller(kChunk, width - channel));
      const T* source = x + half * stride + channel;
      float* target = panel + channel * kCols + half;
      Vec columns[4];
      if (std::is_same_v<T, BFloat16> && count >= kLanes && channels % 8 == 0) {
        // A pair of bfloat16 moves as one number of 32 bits; each half is a float32 once the other is gone.
        for (int pair = 0; pair < channels; pair += 8) {
          load_columns(source + pair, stride * sizeof(T), columns);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) {
            store(target + (pair + 2 * i) * kCols, (Vec)((IntVec)columns[i] << 16));
            store(target + (pair + 2 * i + 1) * kCols, (Vec)((IntVec)columns[i] & ~0xffff));
          }
        }
        continue;
      }
      const float* numbers = reinterpret_cast<const float*>(source);
      std::int64_t bytes = stride * sizeof(T);
      float copy[kLanes * kChunk];
      if (!std::is_same_v<T, float> || count < kLanes || channels % 4 != 0) {
        clear(copy, kLanes * kChunk);
        for (int row = 0; row < smaller(count, kLanes); ++row)
          for (int i = 0; i < channels; i += kLanes)
            store(copy + row * kChunk + i, load_up_to(source + row * stride + i, channels - i));
        numbers = copy;
        bytes = kChunk * sizeof(float);
      }
      for (int first = 0; first < channels; first += 4) {
        load_columns(numbers + first, bytes, columns);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          if (first + i < channels) store(target + (first + i) * kCols, columns[i]);
      }
    }
  }
}

// Rows of a tensor become a panel (rows, kCols) of up to kCols of their channels, zero behind the last one. What a
// product over rows reads is then one stream, which the hardware fetches ahead; of rows as they lie it would fetch two
// cache lines at a time, and those of a power-of-two stride evict each other.
//
// Numbers that are not finite become 0. Returns whether there are any.
template <typename T>
inline bool pack_panel(const T* x, std::int64_t stride, int rows, int width, float* panel) {
  Noticed noticed;
  const auto put = [&](int row, Vec left, Vec right) {
    noticed.look_at(left);
    noticed.look_at(right);
    store(panel + row * kCols, left);
    store(panel + row * kCols + kLanes, right);
  };
  if (width >= kCols) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) put(row, load(x + row * stride), load(x + row * stride + kLanes));
  } else {
    for (int row = 0; row < rows; ++row, x += stride)
      put(row, load_up_to(x, width), width > kLanes ? load_up_to(x + kLanes, width - kLanes) : Vec{});
  }
  if (!noticed.any()) return false;
  float rest[kCols];
  for (int row = 0; row < rows; ++row) set_apart(panel + row * kCols, kCols, rest);
  return true;
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
