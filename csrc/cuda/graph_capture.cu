// What CUDA says about the capture of graphs. Host code only.
#include "andromeda/graph_capture.h"
#include "check.cuh"

namespace andromeda::cuda {
namespace {

constexpr Launch kNoLaunch{"graph_capture", 0, 0, 0};

}  // namespace

unsigned long long capture_id(CUstream_st* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  ANDROMEDA_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &id), kNoLaunch);
  return status == cudaStreamCaptureStatusNone ? 0 : id;
}

bool permit_work_beside_captures(bool permitted) {
  cudaStreamCaptureMode mode = permitted ? cudaStreamCaptureModeRelaxed : cudaStreamCaptureModeGlobal;
  if (cudaThreadExchangeStreamCaptureMode(&mode) != cudaSuccess) {
    cudaGetLastError();  // reported here, so no later call may find it again
    return permitted;
  }
  return mode == cudaStreamCaptureModeRelaxed;
}

}  // namespace andromeda::cuda
