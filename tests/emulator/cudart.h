// The emulated driver of the CUDA runtime in cudart.cpp: the device, the calls that it received, and the reports.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "machine.h"
#include "ptx_library.h"

namespace emulator {

struct Device {
  int major = 8, minor = 0;
  int multiprocessors = 108;
  int shared_per_block = 163 * 1024;           // the most that a kernel can ask for ("opt-in"), bytes
  int shared_per_multiprocessor = 164 * 1024;  // bytes
  int threads_per_multiprocessor = 2048;
  int blocks_per_multiprocessor = 32;
};

// One request for a launch, also one that was refused.
struct Launch {
  std::string kernel;  // demangled, with its template arguments
  std::string entry;   // mangled, as in PTX
  Dim3 grid, block;
  std::size_t shared_bytes;  // dynamic
  std::uintptr_t stream;
  std::string error;    // "cudaSuccess", or the name of the error
  Counters counters{};  // of the blocks that ran
  Dim3 cluster;         // blocks
  bool programmatic = false;
};

// One process has one driver. Its user sets it up before a call and looks at the records after it.
struct Driver {
  static constexpr int kNumDevices = 2;  // identical; tests pass memory of the second one as a mistake

  Device device;
  Settings settings;
  PtxLibrary ptx;
  int version = CUDART_VERSION;                 // the newest CUDA that it runs, 13000 for 13.0; 0: there is no driver
  std::map<std::string, cudaError_t> failures;  // errors that these calls of the runtime return, by name
  std::set<int> contexts;                       // devices that were initialised
  unsigned long long capture = 0;               // the number of the capture that every stream is part of, or 0
  std::map<const void*, int> device_of;         // devices of the buffers that are not on device 0, by first address
  std::vector<Launch> launches;
  std::vector<std::string> calls;  // allocations and synchronisations, by name
  std::vector<Report> reports;
};

Driver& driver();

// The error of this name; cudaSuccess if the emulator does not know it.
cudaError_t error_of_name(const std::string& name);

// Runs a grid with the settings of the driver and appends to its reports. A pointer to memory of a device other than
// `device_index` is reported too.
void run_reported(const Kernel& kernel, const std::string& name, Configuration configuration,
                  const std::vector<std::uint8_t>& parameters, int device_index);

}  // namespace emulator
