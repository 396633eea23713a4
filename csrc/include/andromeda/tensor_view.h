// A tensor as Python passes it to C++: a pointer and its description.
#pragma once

#include <array>
#include <cstdint>

namespace andromeda {

enum class DType : int { kFloat32, kFloat16, kBFloat16, kInt32 };

enum class Device : int { kCpu, kCuda };

inline constexpr int kMaxDims = 4;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  Device device = Device::kCpu;
  int device_index = 0;
  int ndim = 0;
  std::array<std::int64_t, kMaxDims> shape{};
  std::array<std::int64_t, kMaxDims> stride{};  // in elements
};

// Strides of a (batch, seqlen, num_heads, head_dim) tensor whose last dimension is dense.
struct SeqStrides {
  std::int64_t batch, seq, head;  // in elements
};

// Strides of a (batch, seqlen, dim) tensor whose last dimension is dense.
struct RowStrides {
  std::int64_t batch, seq;  // in elements
};

}  // namespace andromeda
