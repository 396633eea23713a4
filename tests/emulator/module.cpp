// The Python module _emulator, which is in the same library as the emulated _C: memory, the emulated driver, PTX.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cudart.h"
#include "machine.h"
#include "memory.h"
#include "presented.h"
#include "subject.h"
#include "tma.h"

namespace py = pybind11;
using namespace emulator;

namespace {

// An address is not used again while any buffer lives, so that a stale pointer is found. When no buffer lives, the
// arena is used again from its start; otherwise thousands of tests would fill the machine's memory.
int live_buffers = 0;

struct Code {
  std::shared_ptr<const Kernel> kernel;
};

std::uintptr_t address_of(void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

Dim3 dim3_of(const std::vector<unsigned>& sizes) {
  if (sizes.empty() || sizes.size() > 3) throw py::value_error("a grid or block must have one to three sizes");
  Dim3 result;
  result.x = sizes[0];
  if (sizes.size() > 1) result.y = sizes[1];
  if (sizes.size() > 2) result.z = sizes[2];
  return result;
}

py::tuple as_tuple(const Dim3& size) { return py::make_tuple(size.x, size.y, size.z); }

Code parse(const std::string& text, const std::string& name) {
  std::string known;
  for (const auto& kernel : parse_ptx(text)) {
    if (name_of(*kernel) == name) return {kernel};
    known += " " + name_of(*kernel);
  }
  throw py::value_error("no kernel " + name + " in this PTX, there is:" + known);
}

std::vector<std::pair<std::size_t, std::size_t>> parameters(const Code& code) {
  std::vector<std::pair<std::size_t, std::size_t>> result;
  for (const Parameter& parameter : parameters_of(*code.kernel)) result.emplace_back(parameter.offset, parameter.bytes);
  return result;
}

void run_code(const Code& code, const std::vector<unsigned>& grid, const std::vector<unsigned>& block,
              std::size_t shared_bytes, const std::string& parameters, const std::vector<unsigned>& cluster,
              bool programmatic) {
  const std::string& name = name_of(*code.kernel);
  driver().launches.push_back({name, name, dim3_of(grid), dim3_of(block), shared_bytes, 0, "cudaSuccess"});
  Launch& record = driver().launches.back();
  record.cluster = dim3_of(cluster);
  record.programmatic = programmatic;
  int device = 0;
  cudaGetDevice(&device);
  const py::gil_scoped_release release;
  run_reported(*code.kernel, name, {record.grid, record.block, shared_bytes, record.cluster, programmatic},
               {parameters.begin(), parameters.end()}, device);
  record.counters = last_counters();
}

void set_device(int device) {
  if (cudaSetDevice(device) != cudaSuccess) throw py::value_error(cudaGetErrorString(cudaGetLastError()));
}

// "cudaSuccess", or name and text of an error as in a message of the library.
std::string describe(cudaError_t error) {
  if (error == cudaSuccess) return cudaGetErrorName(error);
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

dim3 cuda_dim3(const Dim3& size) { return dim3(size.x, size.y, size.z); }

// Calls of the runtime, for test_host.py.
void bind_subject(py::module_ m) {
  using py::arg;
  m.def(
      "launch",
      [](std::uintptr_t out, std::uintptr_t in, int count, float factor, const std::vector<unsigned>& grid,
         const std::vector<unsigned>& block, int shared_bytes, int allowed_shared_bytes, std::uintptr_t stream,
         int cluster, bool large_cluster, bool programmatic) {
        return describe(
            launch_subject({reinterpret_cast<float*>(out), reinterpret_cast<const float*>(in), count, factor,
                            cuda_dim3(dim3_of(grid)), cuda_dim3(dim3_of(block)), shared_bytes, allowed_shared_bytes,
                            reinterpret_cast<cudaStream_t>(stream), cluster, large_cluster, programmatic}));
      },
      py::kw_only(), arg("out"), arg("input"), arg("count"), arg("factor") = 1.0f,
      arg("grid") = std::vector<unsigned>{1}, arg("block") = std::vector<unsigned>{kSubjectThreads},
      arg("shared_bytes") = 0, arg("allowed_shared_bytes") = -1, arg("stream") = 0, arg("cluster") = 0,
      arg("large_cluster") = false, arg("programmatic") = false);
  m.def("clusters", [](int blocks) {
    int clusters = 0;
    const cudaError_t error = count_clusters(blocks, &clusters);
    if (error != cudaSuccess) throw std::runtime_error(describe(error));
    return clusters;
  });
  m.def("launch_repeatedly", [](int count) {  // for host_time.py
    const SubjectCall call{nullptr, nullptr, 0, 1.0f, dim3(1), dim3(kSubjectThreads), 0, -1, nullptr, 0};
    for (int i = 0; i < count; ++i) {
      if (const cudaError_t error = launch_subject(call)) throw std::runtime_error(describe(error));
    }
  });
  m.def("last_errors", [] {
    const auto peeked = cudaPeekAtLastError(), first = cudaGetLastError(), second = cudaGetLastError();
    return std::vector<std::string>{cudaGetErrorName(peeked), cudaGetErrorName(first), cudaGetErrorName(second)};
  });
  m.def("blocks_per_multiprocessor", [](int threads, std::size_t shared_bytes) {
    int blocks = 0;
    const cudaError_t error =
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, subject_function(), threads, shared_bytes);
    if (error != cudaSuccess) throw std::runtime_error(describe(error));
    return blocks;
  });
  m.def("function_attributes", [] {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, subject_function());
    if (error != cudaSuccess) throw std::runtime_error(describe(error));
    return py::make_tuple(attributes.sharedSizeBytes, attributes.maxThreadsPerBlock, attributes.binaryVersion);
  });
  m.def("device_attribute", [](int attribute) {
    int value = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(attribute), 0);
    if (error != cudaSuccess) throw std::runtime_error(describe(error));
    return value;
  });
  m.def("pointer_attributes", [](std::uintptr_t address) {
    cudaPointerAttributes attributes;
    cudaPointerGetAttributes(&attributes, reinterpret_cast<void*>(address));
    return py::make_tuple(attributes.type == cudaMemoryTypeDevice, attributes.device);
  });
  m.def("memset", [](std::uintptr_t address, int value, std::size_t bytes) {
    return describe(cudaMemsetAsync(reinterpret_cast<void*>(address), value, bytes, nullptr));
  });
  m.def("memcpy", [](std::uintptr_t target, std::uintptr_t source, std::size_t bytes) {
    return describe(cudaMemcpyAsync(reinterpret_cast<void*>(target), reinterpret_cast<void*>(source), bytes,
                                    cudaMemcpyDeviceToDevice, nullptr));
  });
  m.def("synchronize", [] { return describe(cudaStreamSynchronize(nullptr)); });
  m.def("malloc_and_free", [] {
    void* pointer = nullptr;
    cudaError_t error = cudaMalloc(&pointer, 16);
    if (error == cudaSuccess) error = cudaFree(pointer);
    return describe(error);
  });
  m.def("current_device", [] {
    int device = -1;
    cudaGetDevice(&device);
    return device;
  });
  m.def("is_capturing", [] {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    cudaStreamIsCapturing(nullptr, &status);
    return status == cudaStreamCaptureStatusActive;
  });
  // The result of encoding a float tensor of `columns` x `rows` for tiles of 16 x 8, as the launchers of sm_90 do it.
  m.def("encode_tensor_map", [](std::uintptr_t address, std::uint64_t columns, std::uint64_t rows) {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaSetDevice(0);  // binds a context
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &status);
    if (status != cudaDriverEntryPointSuccess) throw std::runtime_error("no entry point");
    const cuuint64_t sizes[] = {columns, rows}, strides[] = {columns * sizeof(float)};
    const cuuint32_t box[] = {16, 8}, element_strides[] = {1, 1};
    CUtensorMap map;
    return static_cast<int>(reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
        &map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, reinterpret_cast<void*>(address), sizes, strides, box,
        element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
  });
}

// If a launcher reports an error and leaves it, the next caller of cudaGetLastError finds it and is blamed.
void check_no_error_left() {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  driver().reports.push_back(
      {"error-left", describe(error) + ": cudaGetLastError() would give it to the next call", 0});
}

template <typename T>
std::vector<T> take(std::vector<T>& records) {
  std::vector<T> taken;
  taken.swap(records);
  return taken;
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  py::enum_<Schedule>(m, "Schedule")
      .value("fifo", Schedule::kFifo)
      .value("reverse", Schedule::kReverse)
      .value("random", Schedule::kRandom);

  py::class_<Settings>(m, "Settings")
      .def(py::init<>())
      .def_readwrite("schedule", &Settings::schedule)
      .def_readwrite("seed", &Settings::seed)
      .def_readwrite("check", &Settings::check)
      .def_readwrite("execute", &Settings::execute)
      .def_readwrite("max_reports", &Settings::max_reports)
      .def_readwrite("blocks", &Settings::blocks);

  py::class_<Device>(m, "Device")
      .def(py::init<>())
      .def_readwrite("major", &Device::major)
      .def_readwrite("minor", &Device::minor)
      .def_readwrite("multiprocessors", &Device::multiprocessors)
      .def_readwrite("shared_per_block", &Device::shared_per_block)
      .def_readwrite("shared_per_multiprocessor", &Device::shared_per_multiprocessor)
      .def_readwrite("threads_per_multiprocessor", &Device::threads_per_multiprocessor)
      .def_readwrite("blocks_per_multiprocessor", &Device::blocks_per_multiprocessor);

  py::class_<Report>(m, "Report")
      .def_readonly("kind", &Report::kind)
      .def_readonly("text", &Report::text)
      .def_readonly("line", &Report::line)
      .def("__repr__", [](const Report& report) { return "[" + report.kind + "] " + report.text; });

  py::class_<Counters>(m, "Counters")
      .def_readonly("shared_clocks", &Counters::shared_clocks)
      .def_readonly("instructions", &Counters::instructions)
      .def_readonly("mma", &Counters::mma)
      .def_readonly("wgmma", &Counters::wgmma)
      .def_readonly("barriers", &Counters::barriers)
      .def_readonly("shared_accesses", &Counters::shared_accesses)
      .def_readonly("global_accesses", &Counters::global_accesses)
      .def_readonly("foreign_bytes", &Counters::foreign_bytes);

  py::class_<Launch>(m, "Launch")
      .def_readonly("kernel", &Launch::kernel)
      .def_readonly("entry", &Launch::entry)
      .def_property_readonly("grid", [](const Launch& launch) { return as_tuple(launch.grid); })
      .def_property_readonly("block", [](const Launch& launch) { return as_tuple(launch.block); })
      .def_property_readonly("cluster", [](const Launch& launch) { return as_tuple(launch.cluster); })
      .def_readonly("programmatic", &Launch::programmatic)
      .def_readonly("shared_bytes", &Launch::shared_bytes)
      .def_readonly("stream", &Launch::stream)
      .def_readonly("error", &Launch::error)
      .def_readonly("counters", &Launch::counters)
      .def("__repr__", [](const Launch& launch) {
        return py::str("<{} grid {} block {} shared {} stream {:#x} {}>")
            .format(launch.kernel, as_tuple(launch.grid), as_tuple(launch.block), launch.shared_bytes, launch.stream,
                    launch.error);
      });

  m.def("allocate", [](std::size_t bytes, const std::string& name, bool writable, std::size_t misalignment) {
    ++live_buffers;
    return address_of(global_memory().allocate(bytes, name, writable, misalignment));
  });
  m.def("reserve", [](std::size_t bytes, const std::string& name, bool writable) {
    ++live_buffers;
    return address_of(global_memory().reserve(bytes, name, writable));
  });
  m.def("release", [](std::uintptr_t address) {
    void* pointer = reinterpret_cast<void*>(address);
    driver().device_of.erase(pointer);
    global_memory().release(pointer);
    if (--live_buffers == 0) global_memory().release_all();
  });
  // The bytes of a tensor map, for kernels that are run without a launcher.
  m.def("tensor_map",
        [](std::uintptr_t address, int element_bytes, const std::vector<std::uint64_t>& sizes,
           const std::vector<std::uint64_t>& byte_strides, const std::vector<std::uint32_t>& box, int swizzle) {
          alignas(64) char map[128];
          const std::vector<std::uint32_t> element_strides(sizes.size(), 1);
          const std::string reason =
              encode_tensor_map(map, element_bytes, static_cast<int>(sizes.size()), reinterpret_cast<void*>(address),
                                sizes.data(), byte_strides.data(), box.data(), element_strides.data(), swizzle);
          if (!reason.empty()) throw std::invalid_argument("tensor_map: " + reason);
          return py::bytes(map, sizeof map);
        });
  m.def("set_device_of",
        [](std::uintptr_t address, int device) { driver().device_of[reinterpret_cast<void*>(address)] = device; });

  m.def("set_ptx_files", [](const std::vector<std::string>& paths) { driver().ptx.set_files(paths); });
  m.attr("runtime_version") = CUDART_VERSION;
  m.def("set_up", [](const Device& device, const Settings& settings, unsigned long long capture, int current_device,
                     int driver_version, const std::map<std::string, std::string>& failures) {
    driver().device = device;
    driver().settings = settings;
    driver().capture = capture;
    driver().version = CUDART_VERSION;
    driver().failures.clear();
    set_device(current_device);
    driver().version = driver_version;
    for (const auto& [call, name] : failures) {
      driver().failures[call] = error_of_name(name);
      if (driver().failures[call] == cudaSuccess) throw py::value_error("the emulator does not know the error " + name);
    }
    driver().contexts.clear();
  });
  m.def("gpu_exchange_table", &gpu_exchange_table);
  m.def("contexts", [] { return driver().contexts; });
  m.def("check_no_error_left", &check_no_error_left);
  m.def("take_launches", [] { return take(driver().launches); });
  m.def("take_reports", [] { return take(driver().reports); });
  m.def("take_calls", [] { return take(driver().calls); });

  py::class_<Code>(m, "Code", "One kernel of a PTX text")
      .def_property_readonly("parameters", &parameters)
      .def_property_readonly("required_cluster", [](const Code& code) {
        const Dim3 required = required_cluster_of(*code.kernel);
        return as_tuple(required.x == 0 ? Dim3() : required);
      });
  m.def("parse", &parse);
  m.def("replace_kernel", [](const std::string& entry, const std::optional<Code>& code) {
    driver().ptx.replace(entry, code.has_value() ? code->kernel : nullptr);
  });
  bind_subject(m.def_submodule("subject"));
  m.def("run", &run_code);
}
