// The state of graph capture, as the CUDA runtime reports and sets it. Host code only.
#include "andromeda/device_guard.h"
#include "andromeda/graph_capture.h"
#include "check.cuh"

namespace andromeda::cuda {
namespace {

constexpr Launch kNoLaunch{"graph_capture", 0, 0, 0};

}  // namespace

unsigned long long capture_id(CUstream_st* stream, int device) {
  const DeviceGuard guard(device);  // the default stream has the same number on every device
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  ANDROMEDA_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id), kNoLaunch);
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

bool permit_work_beside_captures(bool permitted) {
  cudaStreamCaptureMode mode = permitted ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
  if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) {
    cudaGetLastError();  // clears the error: no later call may report it
    return permitted;
  }
  return mode == cudaStreamCaptureModeRelaxed;
}

}  // namespace andromeda::cuda
