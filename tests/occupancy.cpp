// Blocks of a kernel that one multiprocessor holds, by the rules in NVIDIA's cuda_occupancy.h: needs no GPU.
//
// A line of the input is "registers threads static_shared dynamic_shared barriers device", bytes where it is memory.
// The line of the output is the number; 0 means that a launch fails. tests/test_kernel_budget.py compiles and asks it.
#include <cuda_occupancy.h>

#include <climits>
#include <cstddef>
#include <iostream>
#include <string>

struct Device {
  const char* name;
  int major, minor, num_sms, threads_per_sm;
  std::size_t shared_per_sm;  // KiB
};

constexpr Device kDevices[] = {
    {"A100", 8, 0, 108, 2048, 164},
    {"RTX 3090", 8, 6, 82, 1536, 100},
    {"L4", 8, 9, 58, 1536, 100},
    {"H200", 9, 0, 132, 2048, 228},
};
constexpr std::size_t kKiB = 1024;

cudaOccDeviceProp properties_of(const Device& device) {
  cudaOccDeviceProp properties;
  properties.computeMajor = device.major;
  properties.computeMinor = device.minor;
  properties.numSms = device.num_sms;
  properties.maxThreadsPerMultiprocessor = device.threads_per_sm;
  properties.sharedMemPerMultiprocessor = device.shared_per_sm * kKiB;
  // The same on all of them: the driver keeps 1 KiB of a block's shared memory for itself.
  properties.reservedSharedMemPerBlock = kKiB;
  properties.sharedMemPerBlockOptin = (device.shared_per_sm - 1) * kKiB;
  properties.sharedMemPerBlock = 48 * kKiB;
  properties.maxThreadsPerBlock = 1024;
  properties.regsPerBlock = 65536;
  properties.regsPerMultiprocessor = 65536;
  properties.warpSize = 32;
  return properties;
}

int main() {
  int registers, threads, barriers;
  std::size_t static_shared, dynamic_shared;
  std::string name;
  while (std::cin >> registers >> threads >> static_shared >> dynamic_shared >> barriers &&
         std::getline(std::cin >> std::ws, name)) {
    const Device* found = nullptr;
    for (const Device& device : kDevices) {
      if (device.name == name) found = &device;
    }
    if (found == nullptr) {
      std::cerr << "occupancy: device must be one of kDevices in occupancy.cpp, got '" << name << "'\n";
      return 1;
    }
    const cudaOccDeviceProp properties = properties_of(*found);
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = INT_MAX;
    kernel.numBlockBarriers = barriers;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_shared;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = dynamic_shared;
    const cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &kernel, &state, threads, dynamic_shared) !=
        CUDA_OCC_SUCCESS) {
      std::cerr << "occupancy: cuda_occupancy.h does not accept the kernel, or does not know '" << name << "'\n";
      return 1;
    }
    std::cout << result.activeBlocksPerMultiprocessor << "\n";
  }
}
