// Versions of CUDA and the state of a device, as dicts; None stands for no version and for no error.
#include "andromeda/cuda_status.h"

#include <optional>
#include <string>

#include "bindings.h"

namespace andromeda::bindings {
namespace {

namespace py = pybind11;

// "13.0" of 13000.
std::optional<std::string> as_text(int version) {
  if (version == 0) return std::nullopt;
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::optional<std::string> as_text(const std::string& error) {
  return error.empty() ? std::nullopt : std::optional(error);
}

py::dict versions() {
  const CudaVersions versions = cuda::cuda_versions();
  py::dict result;
  result["runtime"] = as_text(versions.runtime);
  result["driver"] = as_text(versions.driver);
  return result;
}

py::dict status(int device) {
  CudaStatus status;
  {
    const py::gil_scoped_release release;
    status = cuda::cuda_status(device);
  }
  py::dict result;
  result["device_error"] = as_text(status.device_error);
  result["kernel_error"] = as_text(status.kernel_error);
  result["lasting"] = status.lasting;
  return result;
}

}  // namespace

void bind_cuda_status(py::module_& m) {
  m.def("cuda_versions", &versions,
        "The CUDA version of the kernels (runtime) and the newest that the driver runs. It needs no device.");
  m.def("cuda_status", &status, py::arg("device"),
        "The error of making a device ready, or else the error of loading a kernel for it, and whether the answer "
        "lasts.");
}

}  // namespace andromeda::bindings
