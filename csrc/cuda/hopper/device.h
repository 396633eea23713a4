// Whether a call runs on Hopper, where the kernels of this folder run. Host code only.
#pragma once

#include <cuda_runtime_api.h>

#include "check.cuh"

namespace andromeda::cuda::hopper {

// Whether the current device has compute capability 9.0. The runtime answers from its own memory.
inline bool is_current_device(const Launch& launch) {
  int device = 0, major = 0, minor = 0;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), launch);
  return major == 9 && minor == 0;
}

}  // namespace andromeda::cuda::hopper
