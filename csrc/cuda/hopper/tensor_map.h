// Tensor maps: how the host describes a tensor to TMA (CUDA driver API, cuTensorMapEncodeTiled). Host code only.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "alignment.h"
#include "andromeda/attention.h"
#include "andromeda/tensor_view.h"
#include "attention/tile.cuh"
#include "check.cuh"

namespace andromeda::cuda::hopper {

// One of the tensors of a call, (batch, seqlen, num_heads, head_dim) of 16-bit elements.
struct TensorShape {
  int batch, seqlen, num_heads, head_dim;
};

inline TensorShape shape_of_queries(const AttentionParams& params) {
  return {params.batch, params.seqlen_q, params.num_heads, params.head_dim};
}
inline TensorShape shape_of_keys(const AttentionParams& params) {
  return {params.batch, params.seqlen_k, params.num_kv_heads, params.head_dim};
}

// Whether TMA can copy tiles of a tensor: it is not empty, rows start at multiples of 16 bytes, and no axis is repeated
// by a stride of 0.
inline bool has_tensor_map(const void* data, const SeqStrides& stride, const TensorShape& shape) {
  const auto repeats = [](std::int64_t axis_stride, int size) { return size > 1 && axis_stride <= 0; };
  const bool is_empty = shape.batch == 0 || shape.seqlen == 0 || shape.num_heads == 0 || shape.head_dim == 0;
  return !is_empty && shape.head_dim % 8 == 0 && !repeats(stride.batch, shape.batch) &&
         !repeats(stride.seq, shape.seqlen) && !repeats(stride.head, shape.num_heads) &&
         is_aligned16<std::uint16_t>(data, stride, shape.batch, shape.seqlen, shape.num_heads);
}

// cuTensorMapEncodeTiled of the installed driver: the library is not linked against it.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else  // older toolkits lack that function, and CUDA 13 lacks this one
    const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("andromeda: the CUDA driver has no cuTensorMapEncodeTiled; update the driver");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return encoder;
}

// Binds the context of the current device to the calling thread. The driver's functions may need it; the runtime binds
// it when a thread launches or sets its device, and a thread of autograd may have done neither.
inline void bind_context() {
  thread_local bool is_bound = false;
  if (is_bound) return;
  constexpr Launch kNoLaunch{"tensor map", 0, 0, 0};
  int device = 0;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&device), kNoLaunch);
  ANDROMEDA_CUDA_CHECK(cudaSetDevice(device), kNoLaunch);
  is_bound = true;
}

// The map of boxes of `rows` rows and 64 channels, for tma.cuh. After has_tensor_map().
inline CUtensorMap make_tensor_map(const void* data, const SeqStrides& stride, const TensorShape& shape, int rows) {
  const cuuint64_t sizes[4] = {static_cast<cuuint64_t>(shape.head_dim), static_cast<cuuint64_t>(shape.seqlen),
                               static_cast<cuuint64_t>(shape.num_heads), static_cast<cuuint64_t>(shape.batch)};
  // The stride of an axis of one element is never used, and may be anything.
  const auto bytes = [](std::int64_t axis_stride, int size) {
    return static_cast<cuuint64_t>(size > 1 ? 2 * axis_stride : 16);
  };
  const cuuint64_t strides[3] = {bytes(stride.seq, shape.seqlen), bytes(stride.head, shape.num_heads),
                                 bytes(stride.batch, shape.batch)};
  const cuuint32_t box[4] = {kPanelWidth, static_cast<cuuint32_t>(rows), 1, 1};
  const cuuint32_t element_strides[4] = {1, 1, 1, 1};
  CUtensorMap map;
  bind_context();
  // Copies move bits: the 16-bit type does not matter.
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), sizes, strides, box,
                           element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("andromeda: cuTensorMapEncodeTiled failed with CUresult " + std::to_string(result));
  }
  return map;
}

}  // namespace andromeda::cuda::hopper
