// Finds, before the first launch, why a device cannot run the kernels: a driver that is missing or older than the
// runtime in this library, a device that another process holds, code that the driver can neither load nor compile.
#include <cuda_runtime.h>

#include <string>
#include <thread>

#include "andromeda/cuda_status.h"

namespace andromeda::cuda {

// Never launched, and quick to load. It was compiled for the architectures of all kernels, by the same tools: if the
// driver accepts its code, it accepts theirs.
__global__ void probe_kernel() {}

namespace {

std::string describe(cudaError_t error) {
  return error == cudaSuccess ? "" : std::string(cudaGetErrorName(error)) + ", " + cudaGetErrorString(error);
}

// Whether an error, or success, depends on driver, device and library alone. Other errors depend on the moment (memory,
// other processes) or on the process (a child of a process that had used CUDA).
bool is_lasting(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice:
    case cudaErrorSystemDriverMismatch:
    case cudaErrorCompatNotSupportedOnDevice:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidKernelImage:
    case cudaErrorUnsupportedPtxVersion:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
    case cudaErrorJitCompilationDisabled:
      return true;
    default:
      return false;
  }
}

CudaStatus probe(int device) {
  // Another thread may be capturing a graph: the calls below are not part of it, and may allocate.
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (const cudaError_t error = cudaSetDevice(device)) return {describe(error), "", is_lasting(error)};
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, probe_kernel);
  return {"", describe(error), is_lasting(error)};
}

}  // namespace

CudaVersions cuda_versions() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) {
    cudaGetLastError();  // clears the error: it is handled here, and no later call may report it
    driver = 0;
  }
  return {CUDART_VERSION, driver};
}

// Probes in a thread of its own, because the current device and the last error belong to a thread: the caller's do not
// change. Setting the device back instead would initialise the caller's too, which may be one that nobody uses.
CudaStatus cuda_status(int device) {
  CudaStatus status{};
  std::thread([&] { status = probe(device); }).join();
  return status;
}

}  // namespace andromeda::cuda
