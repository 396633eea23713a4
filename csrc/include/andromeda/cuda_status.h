// Whether the CUDA kernels of this library can run: versions, and the first error of a device.
#pragma once

#include <string>

namespace andromeda {

// As CUDA numbers its versions: 13000 is 13.0.
struct CudaVersions {
  int runtime;  // in this library; 0 when it was built without CUDA
  int driver;   // the newest that the driver runs; 0 without a driver
};

// Name and text of an error; empty when there is none.
struct CudaStatus {
  std::string device_error;  // of making the device ready
  std::string kernel_error;  // of loading a kernel for it
  bool lasting;              // whether the same process will always get this answer
};

namespace cuda {
CudaVersions cuda_versions();  // touches no device
CudaStatus cuda_status(int device);
}  // namespace cuda

}  // namespace andromeda
