// Operands of the products in matrix.h, zero-padded float32, from tensors of any dtype and strides, and results back.
#pragma once

#include <cstdint>
#include <type_traits>

#include "finite.h"
#include "matrix.h"
#include "rows.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

// Reads `width` numbers as float32, times `factor`, and pads them with zeros to a multiple of kCols.
template <typename T>
inline void read_row(const T* x, int width, float factor, float* row, NonFiniteFlag& not_finite) {
  const auto put = [&](int channel, Vec numbers) {
    not_finite.include(numbers);
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
  NonFiniteFlag ignored;
  read_row(x, width, factor, row, ignored);
}

template <typename T>
inline void write_row(const float* row, int width, float factor, T* x) {
  int channel = 0;
  for (; channel + kLanes <= width; channel += kLanes) store(x + channel, load(row + channel) * factor);
  if (channel < width) store_first(x + channel, load(row + channel) * factor, width - channel);
}

// Transposes up to kCols rows of a tensor into a panel (width, kCols), zero after the last row.
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
        // A pair of bfloat16 moves as one number of 32 bits; each half is a float32 once the other half is cleared.
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

// Copies up to kCols channels of the rows of a tensor into a panel (rows, kCols), zero after the last channel. A
// product over rows then reads one stream, which the hardware prefetches. From rows in place it would read two cache
// lines at a time, and rows whose stride is a power of two evict each other.
//
// Numbers that are not finite become 0. Returns whether there are any.
template <typename T>
inline bool pack_panel(const T* x, std::int64_t stride, int rows, int width, float* panel) {
  NonFiniteFlag not_finite;
  const auto put = [&](int row, Vec left, Vec right) {
    not_finite.include(left);
    not_finite.include(right);
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
  if (!not_finite.any()) return false;
  float rest[kCols];
  for (int row = 0; row < rows; ++row) separate_not_finite(panel + row * kCols, kCols, rest);
  return true;
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
