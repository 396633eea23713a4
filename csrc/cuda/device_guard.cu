// The current device of a thread, as the CUDA runtime knows it. Host code only.
#include "andromeda/device_guard.h"
#include "check.cuh"

namespace andromeda::cuda {
namespace {

constexpr Launch kNoLaunch{"device_guard", 0, 0, 0};

}  // namespace

DeviceGuard::DeviceGuard(int device) {
  int current = -1;
  ANDROMEDA_CUDA_CHECK(cudaGetDevice(&current), kNoLaunch);
  if (current == device) return;
  ANDROMEDA_CUDA_CHECK(cudaSetDevice(device), kNoLaunch);
  before_ = current;
}

DeviceGuard::~DeviceGuard() {
  if (before_ >= 0) cudaSetDevice(before_);  // it was the current one: this cannot fail
}

}  // namespace andromeda::cuda
