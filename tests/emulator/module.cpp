// The Python module _emulator, which lives in the same library as the emulated _C: memory, the pretended driver, PTX.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>

#include "cudart.h"
#include "machine.h"
#include "memory.h"

namespace py = pybind11;
using namespace emulator;

namespace {

// An address is not used again while any buffer lives, so that a stale pointer is found. When none does the arena
// starts anew: thousands of tests would fill the machine's memory otherwise.
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
              std::size_t shared_bytes, const std::string& parameters) {
  const std::string& name = name_of(*code.kernel);
  driver().launches.push_back({name, name, dim3_of(grid), dim3_of(block), shared_bytes, 0, "cudaSuccess"});
  Launch& record = driver().launches.back();
  int device = 0;
  cudaGetDevice(&device);
  const py::gil_scoped_release release;
  run_reported(*code.kernel, name, record.grid, record.block, shared_bytes, {parameters.begin(), parameters.end()},
               device);
  record.counters = last_counters();
}

void set_device(int device) {
  if (cudaSetDevice(device) != cudaSuccess) throw py::value_error(cudaGetErrorString(cudaGetLastError()));
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
      .def("__repr__", [](const Report& report) {
        return "[" + report.kind + "] " + report.text +
               (report.line > 0 ? " (line " + std::to_string(report.line) + ")" : "");
      });

  py::class_<Counters>(m, "Counters")
      .def_readonly("instructions", &Counters::instructions)
      .def_readonly("mma", &Counters::mma)
      .def_readonly("wgmma", &Counters::wgmma)
      .def_readonly("barriers", &Counters::barriers)
      .def_readonly("shared_accesses", &Counters::shared_accesses)
      .def_readonly("global_accesses", &Counters::global_accesses);

  py::class_<Launch>(m, "Launch")
      .def_readonly("kernel", &Launch::kernel)
      .def_readonly("entry", &Launch::entry)
      .def_property_readonly("grid", [](const Launch& launch) { return as_tuple(launch.grid); })
      .def_property_readonly("block", [](const Launch& launch) { return as_tuple(launch.block); })
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
  m.def("set_device_of",
        [](std::uintptr_t address, int device) { driver().device_of[reinterpret_cast<void*>(address)] = device; });

  m.def("set_ptx_files", [](const std::vector<std::string>& paths) { driver().ptx.set_files(paths); });
  m.def("set_up", [](const Device& device, const Settings& settings, bool capturing, int current_device) {
    driver().device = device;
    driver().settings = settings;
    driver().capturing = capturing;
    set_device(current_device);
  });
  m.def("take_launches", [] { return take(driver().launches); });
  m.def("take_reports", [] { return take(driver().reports); });
  m.def("take_calls", [] { return take(driver().calls); });

  py::class_<Code>(m, "Code", "One kernel of a PTX text").def_property_readonly("parameters", &parameters);
  m.def("parse", &parse);
  m.def("run", &run_code);
}
