// Whether tensors can be moved in accesses of 16 bytes. Host code only.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>

#include "andromeda/tensor_view.h"
#include "load.cuh"

namespace andromeda::cuda {

inline bool is_aligned16(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % kVec16Bytes == 0; }

// Whether every row of a tensor starts at a multiple of 16 bytes. `dimensions`: size and stride of each but the last
// one; the stride of a dimension of size 1 is never used.
template <typename T>
bool is_aligned16(const void* data, std::initializer_list<std::pair<int, std::int64_t>> dimensions) {
  for (const auto& [size, stride] : dimensions) {
    if (size > 1 && stride % kVec16Width<T> != 0) return false;
  }
  return is_aligned16(data);
}

template <typename T>
bool is_aligned16(const void* data, const SeqStrides& stride, int batch, int seqlen, int num_heads) {
  return is_aligned16<T>(data, {{batch, stride.batch}, {seqlen, stride.seq}, {num_heads, stride.head}});
}

}  // namespace andromeda::cuda
