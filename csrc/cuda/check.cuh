// CUDA errors as exceptions that name the launch, the device, and the architectures that the kernels are built for.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

namespace andromeda::cuda {

struct Launch {
  const char* kernel;
  unsigned num_blocks, num_threads;
  std::size_t shared_bytes;  // dynamic
};

inline std::string describe_current_device() {
  int device = -1, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return "device " + std::to_string(device) + ", of compute capability " + std::to_string(major) + "." +
         std::to_string(minor);
}

// "8.0, 9.0". nvcc defines the list as 800,900. Static, as is check(): sources differ in the list, and the linker would
// keep the copy of one of them.
static inline std::string describe_architectures() {
  std::string text;
  for (const int architecture : {__CUDA_ARCH_LIST__}) {
    text +=
        (text.empty() ? "" : ", ") + std::to_string(architecture / 100) + "." + std::to_string(architecture % 100 / 10);
  }
  return text;
}

static inline void check(cudaError_t status, const char* call, const Launch& launch) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears the error: it is reported here, and no later call may report it again
  throw std::runtime_error(std::string(launch.kernel) + ": " + call + " returned " + cudaGetErrorName(status) + ", " +
                           cudaGetErrorString(status) + ", for " + std::to_string(launch.num_blocks) + " blocks of " +
                           std::to_string(launch.num_threads) + " threads and " + std::to_string(launch.shared_bytes) +
                           " bytes of dynamic shared memory on " + describe_current_device() +
                           " (kernels are built for " + describe_architectures() + ")");
}

// ANDROMEDA_CUDA_CHECK(cudaGetLastError(), launch): std::runtime_error unless the call returns cudaSuccess.
#define ANDROMEDA_CUDA_CHECK(call, launch) ::andromeda::cuda::check((call), #call, (launch))

// Of the current device.
static inline int count_multiprocessors(const Launch& launch) {
  int device = 0, count = 0;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&device), launch);
  ANDROMEDA_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), launch);
  return count;
}

// Permits a kernel to use more than 48 KiB of dynamic shared memory, once on each device. launch: with the largest size
// of all launches of the kernel.
template <typename Kernel>
void allow_shared_bytes(Kernel* kernel, const Launch& launch) {
  static std::mutex mutex;
  static std::set<std::pair<Kernel*, int>> allowed;
  int device = 0;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&device), launch);
  const std::lock_guard<std::mutex> lock(mutex);
  if (allowed.count({kernel, device}) != 0) return;
  ANDROMEDA_CUDA_CHECK(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(launch.shared_bytes)),
      launch);
  allowed.insert({kernel, device});
}

}  // namespace andromeda::cuda
