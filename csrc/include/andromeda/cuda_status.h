// Whether the CUDA kernels of this library can run: versions, and the first error of a device.
#pragma once

#include <string>

namespace andromeda {

// Version numbers of CUDA: 13000 is 13.0.
struct CudaVersions {
  int runtime;  // in this library; 0 when it was built without CUDA
  int driver;   // the newest that the driver supports; 0 without a driver
};

// Name and text of an error; empty when there is none.
struct CudaStatus {
  std::string device_error;  // of initialising the device
  std::string kernel_error;  // of loading a kernel on it
  bool lasting;              // whether the same process will always get this answer
};

namespace cuda {
CudaVersions cuda_versions();  // initialises no device
CudaStatus cuda_status(int device);
}  // namespace cuda

}  // namespace andromeda
