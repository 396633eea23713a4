// The part of the CUDA runtime that compiled host code uses, on a machine without a driver. Launches go to the
// emulator; queries are answered for the emulated device.
//
// It is as strict as the strictest device: a call that any device might refuse is refused here, and the text of the
// error says why. Errors behave like CUDA's: a call returns its error and leaves it for cudaGetLastError, which returns
// it once. If a function is missing here, the import of the library fails and names it.
#include "cudart.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <iterator>
#include <utility>

#include "memory.h"
#include "tma.h"

namespace emulator {
namespace {

constexpr std::size_t kDefaultShared = 48 * 1024;  // of a block that did not ask for more
constexpr std::size_t kReservedShared = 1024;      // of every block, for the system
constexpr unsigned kMaxGridYZ = 65535;
constexpr unsigned kMaxGridX = 2147483647;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxBlockZ = 64;
constexpr unsigned kPortableCluster = 8;  // blocks
constexpr unsigned kMaxCluster = 16;

// State of CUDA that belongs to a host thread.
struct ThreadState {
  struct Configuration {
    dim3 grid, block;
    std::size_t shared_bytes;
    cudaStream_t stream;
  };
  cudaError_t last_error = cudaSuccess;
  cudaError_t explained_error = cudaSuccess;  // the error that `explanation` explains
  std::string explanation, error_text;
  int device = 0;
  bool has_context = false;  // bound by the first call that needs one; functions of the driver bind none
  cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
  std::vector<Configuration> configurations;  // of <<<...>>>, between its push and its pop
};
thread_local ThreadState thread_state;

cudaError_t fail(cudaError_t error, const std::string& explanation) {
  thread_state.last_error = thread_state.explained_error = error;
  thread_state.explanation = explanation;
  return error;
}

// A __global__ function of the host code.
struct Function {
  std::string entry;            // mangled name
  std::size_t allowed_dynamic;  // cudaFuncAttributeMaxDynamicSharedMemorySize, 0 if it was never set
  bool any_cluster = false;     // cudaFuncAttributeNonPortableClusterSizeAllowed
};

std::map<const void*, Function>& functions() {
  // Filled by constructors of other files, so it must exist before them.
  static std::map<const void*, Function> functions;
  return functions;
}

std::string demangle(const std::string& name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string result = status == 0 ? readable : name;
  std::free(readable);
  return result;
}

std::string describe(const dim3& size) {
  return std::to_string(size.x) + " x " + std::to_string(size.y) + " x " + std::to_string(size.z);
}

#define NAMED(error) {error, #error}
constexpr std::pair<cudaError_t, const char*> kErrors[] = {
    NAMED(cudaSuccess),
    NAMED(cudaErrorCompatNotSupportedOnDevice),
    NAMED(cudaErrorDevicesUnavailable),
    NAMED(cudaErrorInitializationError),
    NAMED(cudaErrorInsufficientDriver),
    NAMED(cudaErrorInvalidClusterSize),
    NAMED(cudaErrorInvalidConfiguration),
    NAMED(cudaErrorInvalidDevice),
    NAMED(cudaErrorInvalidDeviceFunction),
    NAMED(cudaErrorInvalidKernelImage),
    NAMED(cudaErrorInvalidPtx),
    NAMED(cudaErrorInvalidValue),
    NAMED(cudaErrorJitCompilationDisabled),
    NAMED(cudaErrorJitCompilerNotFound),
    NAMED(cudaErrorLaunchFailure),
    NAMED(cudaErrorMemoryAllocation),
    NAMED(cudaErrorNoDevice),
    NAMED(cudaErrorNoKernelImageForDevice),
    NAMED(cudaErrorNotSupported),
    NAMED(cudaErrorStreamCaptureUnsupported),
    NAMED(cudaErrorSystemDriverMismatch),
    NAMED(cudaErrorSystemNotReady),
    NAMED(cudaErrorUnsupportedPtxVersion),
};
#undef NAMED

const char* name_of_error(cudaError_t error) {
  for (const auto& [known, name] : kErrors) {
    if (known == error) return name;
  }
  return "cudaErrorUnknown";
}

// The error of a call that fails with any arguments: the driver is missing or of an older major version than this
// runtime, or a test wants the call to fail.
cudaError_t refusal(const char* call) {
  if (driver().version / 1000 < CUDART_VERSION / 1000) {
    return fail(cudaErrorInsufficientDriver, "the driver runs CUDA " + std::to_string(driver().version) +
                                                 ", the runtime is of " + std::to_string(CUDART_VERSION));
  }
  if (driver().failures.empty()) return cudaSuccess;
  const auto wanted = driver().failures.find(call);
  if (wanted == driver().failures.end()) return cudaSuccess;
  return fail(wanted->second, std::string(call) + " is to fail");
}

// The function and its kernel for the emulated device.
cudaError_t look_up(const char* call, const void* stub, Function*& function, std::shared_ptr<const Kernel>& kernel) {
  if (const cudaError_t error = refusal(call)) return error;
  driver().contexts.insert(thread_state.device);
  thread_state.has_context = true;
  const auto entry = functions().find(stub);
  if (entry == functions().end()) return fail(cudaErrorInvalidDeviceFunction, "not a registered __global__ function");
  function = &entry->second;
  const Device& device = driver().device;
  try {
    kernel = driver().ptx.find(function->entry, device.major, device.minor);
  } catch (const std::exception& error) {
    return fail(cudaErrorNoKernelImageForDevice, error.what());
  }
  if (kernel == nullptr) {
    return fail(cudaErrorNoKernelImageForDevice, "no PTX of " + function->entry + " for compute capability " +
                                                     std::to_string(device.major) + "." + std::to_string(device.minor) +
                                                     ", there is: " + driver().ptx.architectures_of(function->entry));
  }
  return cudaSuccess;
}

cudaError_t check_launch(const Function& function, const Kernel& kernel, const dim3& grid, const dim3& block,
                         std::size_t dynamic) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    return fail(cudaErrorInvalidConfiguration, "a grid of " + describe(grid) + " blocks");
  }
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || block.z > kMaxBlockZ) {
    return fail(cudaErrorInvalidConfiguration, "blocks of " + describe(block) + " threads");
  }
  if (threads > max_threads_of(kernel)) {
    return fail(cudaErrorInvalidValue, std::to_string(threads) + " threads, __launch_bounds__ promised at most " +
                                           std::to_string(max_threads_of(kernel)));
  }
  const std::size_t fixed = static_shared_of(kernel);
  if (fixed + dynamic > std::max(kDefaultShared, fixed + function.allowed_dynamic)) {
    return fail(cudaErrorInvalidValue,
                std::to_string(dynamic) + " bytes of dynamic shared memory (and " + std::to_string(fixed) +
                    " static), above 48 KiB and above cudaFuncAttributeMaxDynamicSharedMemorySize, which is " +
                    std::to_string(function.allowed_dynamic));
  }
  // An attribute that was set for a larger device does not help on this one.
  if (fixed + dynamic > static_cast<std::size_t>(driver().device.shared_per_block)) {
    return fail(cudaErrorInvalidValue, std::to_string(fixed + dynamic) + " bytes of shared memory, the device has " +
                                           std::to_string(driver().device.shared_per_block) + " for a block");
  }
  return cudaSuccess;
}

cudaError_t check_cluster(const Function& function, const Kernel& kernel, const dim3& grid, const Dim3& cluster) {
  const Dim3 required = required_cluster_of(kernel);
  if (required.x != 0 && (cluster.x != required.x || cluster.y != required.y || cluster.z != required.z)) {
    return fail(cudaErrorInvalidValue, "clusters of " + describe(dim3(cluster.x, cluster.y, cluster.z)) +
                                           " blocks, __cluster_dims__ promised " +
                                           describe(dim3(required.x, required.y, required.z)));
  }
  const std::uint64_t blocks = std::uint64_t{cluster.x} * cluster.y * cluster.z;
  if (blocks == 1) return cudaSuccess;
  const std::string size = "clusters of " + describe(dim3(cluster.x, cluster.y, cluster.z)) + " blocks";
  if (driver().device.major < 9) return fail(cudaErrorNotSupported, size + ", which need compute capability 9.0");
  const unsigned most = function.any_cluster ? kMaxCluster : kPortableCluster;
  if (blocks == 0 || blocks > most) {
    return fail(cudaErrorInvalidClusterSize,
                size + ", at most " + std::to_string(most) +
                    (function.any_cluster ? "" : " without cudaFuncAttributeNonPortableClusterSizeAllowed"));
  }
  if (grid.x % cluster.x != 0 || grid.y % cluster.y != 0 || grid.z % cluster.z != 0) {
    return fail(cudaErrorInvalidConfiguration, size + " in a grid of " + describe(grid) + ", which is no multiple");
  }
  return cudaSuccess;
}

// By threads, blocks and shared memory alone: PTX does not say how many registers a kernel needs.
int blocks_per_multiprocessor(const Kernel& kernel, std::int64_t threads, std::size_t dynamic) {
  const Device& device = driver().device;
  const std::size_t shared = static_shared_of(kernel) + dynamic + kReservedShared;
  return std::min({device.blocks_per_multiprocessor, static_cast<int>(device.threads_per_multiprocessor / threads),
                   static_cast<int>(device.shared_per_multiprocessor / shared)});
}

// `cluster`: 0 x 0 x 0 if the launch does not say.
cudaError_t launch(const void* stub, const dim3& grid, const dim3& block, void** arguments, std::size_t dynamic,
                   cudaStream_t stream, Dim3 cluster = {0, 0, 0}, bool programmatic = false) {
  if (!driver().settings.execute) return cudaSuccess;
  const auto known = functions().find(stub);
  const std::string entry = known == functions().end() ? "unknown" : known->second.entry;
  driver().launches.push_back({demangle(entry),
                               entry,
                               {grid.x, grid.y, grid.z},
                               {block.x, block.y, block.z},
                               dynamic,
                               reinterpret_cast<std::uintptr_t>(stream),
                               name_of_error(cudaSuccess)});
  Launch& record = driver().launches.back();
  const auto refused = [&](cudaError_t error) {
    record.error = name_of_error(error);
    return error;
  };

  Function* function = nullptr;
  std::shared_ptr<const Kernel> kernel;
  if (const cudaError_t error = look_up("cudaLaunchKernel", stub, function, kernel)) return refused(error);
  if (const cudaError_t error = check_launch(*function, *kernel, grid, block, dynamic)) return refused(error);
  if (cluster.x == 0) cluster = required_cluster_of(*kernel);
  if (cluster.x == 0) cluster = Dim3();
  record.cluster = cluster;
  record.programmatic = programmatic;
  if (programmatic && driver().device.major < 9) {
    return refused(
        fail(cudaErrorNotSupported, "programmatic stream serialization, which needs compute capability 9.0"));
  }
  if (const cudaError_t error = check_cluster(*function, *kernel, grid, cluster)) return refused(error);

  std::vector<std::uint8_t> parameters;
  const std::vector<Parameter>& layout = parameters_of(*kernel);
  for (std::size_t i = 0; i < layout.size(); ++i) {
    parameters.resize(std::max(parameters.size(), layout[i].offset + layout[i].bytes));
    std::memcpy(parameters.data() + layout[i].offset, arguments[i], layout[i].bytes);
  }
  try {
    run_reported(*kernel, record.kernel, {record.grid, record.block, dynamic, cluster, programmatic}, parameters,
                 thread_state.device);
  } catch (const std::exception& error) {
    return refused(fail(cudaErrorLaunchFailure, std::string("the emulator stopped: ") + error.what()));
  }
  record.counters = last_counters();
  return cudaSuccess;
}

// Records a call that a launcher must not make: it costs time, and breaks the capture of a graph.
cudaError_t record_call(const char* name) {
  driver().calls.push_back(name);
  if (driver().capture != 0 && thread_state.capture_mode != cudaStreamCaptureModeRelaxed) {
    return fail(cudaErrorStreamCaptureUnsupported, std::string(name) + " during a capture");
  }
  return cudaSuccess;
}

cudaError_t allocate(const char* name, void** pointer, std::size_t bytes) {
  if (const cudaError_t error = record_call(name)) return error;
  *pointer = global_memory().allocate(bytes, name, /*writable=*/true);
  if (thread_state.device != 0) driver().device_of[*pointer] = thread_state.device;
  return cudaSuccess;
}

cudaError_t release(const char* name, void* pointer) {
  if (const cudaError_t error = record_call(name)) return error;
  driver().device_of.erase(pointer);
  if (pointer != nullptr) global_memory().release(pointer);
  return cudaSuccess;
}

// Whether an operation of the runtime may touch [begin, begin + bytes). Memory of the host is not checked.
void check_range(const char* name, const void* begin, std::size_t bytes, bool writes, bool must_be_device) {
  const Buffer* buffer = global_memory().find(begin);
  const auto report = [&](const char* kind, const std::string& text) {
    driver().reports.push_back({kind, std::string(name) + ": " + text, 0});
  };
  if (buffer == nullptr) {
    if (must_be_device && bytes > 0) report("out-of-bounds", "the address is in no buffer");
    return;
  }
  const std::size_t offset = static_cast<const std::uint8_t*>(begin) - buffer->begin;
  if (offset + bytes > buffer->bytes) {
    report("out-of-bounds", "bytes " + std::to_string(offset) + " to " + std::to_string(offset + bytes) + " of \"" +
                                buffer->name + "\", which has " + std::to_string(buffer->bytes));
  }
  if (writes && !buffer->writable) report("read-only", "writes \"" + buffer->name + "\"");
}

// cuTensorMapEncodeTiled of the driver.
CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* byte_strides, const cuuint32_t* box,
                      const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const auto refuse = [](const std::string& reason) {
    driver().reports.push_back({"tma", "cuTensorMapEncodeTiled: " + reason, 0});
    return CUDA_ERROR_INVALID_VALUE;
  };
  if (!thread_state.has_context) {
    refuse("no context is current in this thread, which has neither set its device nor launched anything");
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  int element_bytes = 0, swizzle_bytes = 0;
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      element_bytes = 1;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      element_bytes = 2;
      break;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      element_bytes = 4;
      break;
    default:
      return refuse("the emulator does not know data type " + std::to_string(static_cast<int>(type)));
  }
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      break;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      swizzle_bytes = 32;
      break;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      swizzle_bytes = 64;
      break;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      swizzle_bytes = 128;
      break;
    default:
      return refuse("the emulator does not know swizzle " + std::to_string(static_cast<int>(swizzle)));
  }
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse("the emulator knows no interleaved layout");
  if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return refuse("the emulator fills with zeros only");
  if (driver().device.major < 9) return refuse("the device has no tensor maps (compute capability 9.0)");
  const std::vector<std::uint64_t> extents(sizes, sizes + rank);
  const std::vector<std::uint64_t> strides(byte_strides, byte_strides + (rank > 0 ? rank - 1 : 0));
  const std::string reason = encode_tensor_map(map, element_bytes, static_cast<int>(rank), address, extents.data(),
                                               strides.data(), box, element_strides, swizzle_bytes);
  return reason.empty() ? CUDA_SUCCESS : refuse(reason);
}

cudaError_t driver_entry_point(const char* symbol, void** pointer, cudaDriverEntryPointQueryResult* status) {
  const bool known = std::strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
  *pointer = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (status != nullptr) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // namespace

Driver& driver() {
  static Driver driver;
  return driver;
}

cudaError_t error_of_name(const std::string& name) {
  for (const auto& [error, known] : kErrors) {
    if (known == name) return error;
  }
  return cudaSuccess;
}

void run_reported(const Kernel& kernel, const std::string& name, Configuration configuration,
                  const std::vector<std::uint8_t>& parameters, int device_index) {
  std::vector<Report>& reports = driver().reports;
  for (std::size_t offset = 0; offset + sizeof(void*) <= parameters.size(); offset += sizeof(void*)) {
    void* word = nullptr;
    std::memcpy(&word, parameters.data() + offset, sizeof word);
    const Buffer* buffer = global_memory().find(word);
    if (buffer == nullptr) continue;
    const auto elsewhere = driver().device_of.find(buffer->begin);
    const int home = elsewhere == driver().device_of.end() ? 0 : elsewhere->second;
    if (home != device_index) {
      reports.push_back({"device",
                         name + ": \"" + buffer->name + "\" is on device " + std::to_string(home) +
                             ", the kernel was launched on device " + std::to_string(device_index),
                         0});
    }
  }
  const Dim3& block = configuration.block;
  const std::int64_t threads = std::max(std::int64_t{block.x} * block.y * block.z, std::int64_t{1});
  configuration.max_resident = std::int64_t{driver().device.multiprocessors} *
                               blocks_per_multiprocessor(kernel, threads, configuration.dynamic_shared);
  for (Report& report : run(kernel, configuration, parameters, driver().settings)) {
    report.text = name + ": " + report.text;
    reports.push_back(std::move(report));
  }
}

}  // namespace emulator

using emulator::driver;
using emulator::fail;
using emulator::thread_state;

// ---- calls that nvcc generates --------------------------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void* /*fat_binary*/) {
  static void* handle = nullptr;  // the machine code is not used, so one handle serves all
  return &handle;
}

void __cudaRegisterFatBinaryEnd(void** /*handle*/) {}
void __cudaUnregisterFatBinary(void** /*handle*/) {}
char __cudaInitModule(void** /*handle*/) { return 0; }

void __cudaRegisterFunction(void** /*handle*/, const char* stub, char* /*device_function*/, const char* name,
                            int /*thread_limit*/, void*, void*, void*, void*, int*) {
  emulator::functions()[stub] = {name, 0};
}

// Variables of a kernel's file have their initial values in its PTX. Host code cannot reach them: there is no
// cudaMemcpyToSymbol.
void __cudaRegisterVar(void** /*handle*/, char*, char*, const char*, int, std::size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, std::size_t shared_bytes, cudaStream_t stream) {
  thread_state.configurations.push_back({grid, block, shared_bytes, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, std::size_t* shared_bytes, void* stream) {
  const auto configuration = thread_state.configurations.back();
  thread_state.configurations.pop_back();
  *grid = configuration.grid;
  *block = configuration.block;
  *shared_bytes = configuration.shared_bytes;
  *static_cast<cudaStream_t*>(stream) = configuration.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes,
                               cudaStream_t stream) {
  return emulator::launch(kernel, grid, block, arguments, shared_bytes, stream);
}

// ---- launches -------------------------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, std::size_t shared_bytes,
                             cudaStream_t stream) {
  return emulator::launch(stub, grid, block, arguments, shared_bytes, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  emulator::Dim3 cluster{0, 0, 0};
  bool programmatic = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    const auto& size = attribute.val.clusterDim;
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = {size.x, size.y, size.z};
      if (size.x * size.y * size.z == 0) return fail(cudaErrorInvalidClusterSize, "clusters of no blocks");
      continue;
    }
    if (attribute.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      programmatic = attribute.val.programmaticStreamSerializationAllowed != 0;
      continue;
    }
    const bool harmless = attribute.id == cudaLaunchAttributePriority ||
                          attribute.id == cudaLaunchAttributeMemSyncDomain ||
                          attribute.id == cudaLaunchAttributeClusterSchedulingPolicyPreference;
    if (!harmless) {
      return fail(cudaErrorNotSupported,
                  "the emulator does not know launch attribute " + std::to_string(static_cast<int>(attribute.id)));
    }
  }
  return emulator::launch(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream,
                          cluster, programmatic);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  emulator::Function* function = nullptr;
  std::shared_ptr<const emulator::Kernel> kernel;
  if (const cudaError_t error = emulator::look_up("cudaFuncSetAttribute", stub, function, kernel)) return error;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;  // a hint about speed
  if (attribute == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    function->any_cluster = value != 0;
    return cudaSuccess;
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) {
    return fail(cudaErrorInvalidValue, "the emulator does not know function attribute " + std::to_string(attribute));
  }
  const std::size_t fixed = emulator::static_shared_of(*kernel);
  if (value < 0 || fixed + value > static_cast<std::size_t>(driver().device.shared_per_block)) {
    return fail(cudaErrorInvalidValue, std::to_string(value) + " bytes of dynamic shared memory and " +
                                           std::to_string(fixed) + " static ones, the device has " +
                                           std::to_string(driver().device.shared_per_block) + " for a block");
  }
  function->allowed_dynamic = value;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  emulator::Function* function = nullptr;
  std::shared_ptr<const emulator::Kernel> kernel;
  if (const cudaError_t error = emulator::look_up("cudaFuncGetAttributes", stub, function, kernel)) return error;
  if (driver().capture != 0 && thread_state.capture_mode != cudaStreamCaptureModeRelaxed) {
    return fail(cudaErrorStreamCaptureUnsupported, "cudaFuncGetAttributes during a capture: it may load the kernel");
  }
  *attributes = {};
  attributes->sharedSizeBytes = emulator::static_shared_of(*kernel);
  attributes->maxThreadsPerBlock = static_cast<int>(emulator::max_threads_of(*kernel));
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(function->allowed_dynamic);
  attributes->binaryVersion = 10 * driver().device.major + driver().device.minor;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void* stub, int threads,
                                                                   std::size_t dynamic, unsigned /*flags*/) {
  emulator::Function* function = nullptr;
  std::shared_ptr<const emulator::Kernel> kernel;
  if (const cudaError_t error =
          emulator::look_up("cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags", stub, function, kernel))
    return error;
  if (const cudaError_t error = emulator::check_launch(*function, *kernel, dim3(1), dim3(threads), dynamic)) {
    return error;
  }
  *blocks = emulator::blocks_per_multiprocessor(*kernel, threads, dynamic);
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads,
                                                          std::size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, dynamic, 0);
}

// As if the blocks of a cluster could be on any multiprocessors.
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* stub, const cudaLaunchConfig_t* config) {
  unsigned blocks = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& size = config->attrs[i].val.clusterDim;
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) blocks = size.x * size.y * size.z;
  }
  const dim3& block = config->blockDim;
  const int threads = static_cast<int>(block.x * block.y * block.z);
  int of_multiprocessor = 0;
  const cudaError_t error = cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(&of_multiprocessor, stub, threads,
                                                                                   config->dynamicSmemBytes, 0);
  if (error != cudaSuccess) return error;
  if (blocks == 0) return fail(cudaErrorInvalidClusterSize, "clusters of no blocks");
  *clusters = of_multiprocessor * driver().device.multiprocessors / static_cast<int>(blocks);
  return cudaSuccess;
}

// ---- devices --------------------------------------------------------------------------------------------------------

cudaError_t cudaGetDeviceCount(int* count) {
  if (const cudaError_t error = emulator::refusal("cudaGetDeviceCount")) return error;
  *count = emulator::Driver::kNumDevices;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  if (const cudaError_t error = emulator::refusal("cudaGetDevice")) return error;
  *device = thread_state.device;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  if (const cudaError_t error = emulator::refusal("cudaSetDevice")) return error;
  if (device < 0 || device >= emulator::Driver::kNumDevices) {
    return fail(cudaErrorInvalidDevice,
                "device " + std::to_string(device) + " of " + std::to_string(emulator::Driver::kNumDevices));
  }
  thread_state.device = device;
  thread_state.has_context = true;
  driver().contexts.insert(device);
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver().version;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device_index) {
  if (const cudaError_t error = emulator::refusal("cudaDeviceGetAttribute")) return error;
  if (device_index < 0 || device_index >= emulator::Driver::kNumDevices) {
    return fail(cudaErrorInvalidDevice, "device " + std::to_string(device_index));
  }
  const emulator::Device& device = driver().device;
  const std::pair<cudaDeviceAttr, int> values[] = {
      {cudaDevAttrComputeCapabilityMajor, device.major},
      {cudaDevAttrComputeCapabilityMinor, device.minor},
      {cudaDevAttrMultiProcessorCount, device.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlock, static_cast<int>(emulator::kDefaultShared)},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_per_block},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.shared_per_multiprocessor},
      {cudaDevAttrReservedSharedMemoryPerBlock, static_cast<int>(emulator::kReservedShared)},
      {cudaDevAttrMaxThreadsPerMultiProcessor, device.threads_per_multiprocessor},
      {cudaDevAttrMaxBlocksPerMultiprocessor, device.blocks_per_multiprocessor},
      {cudaDevAttrMaxThreadsPerBlock, static_cast<int>(emulator::kMaxThreads)},
      {cudaDevAttrMaxGridDimX, static_cast<int>(emulator::kMaxGridX)},
      {cudaDevAttrMaxGridDimY, static_cast<int>(emulator::kMaxGridYZ)},
      {cudaDevAttrMaxGridDimZ, static_cast<int>(emulator::kMaxGridYZ)},
      {cudaDevAttrMaxRegistersPerBlock, 65536},
      {cudaDevAttrMaxRegistersPerMultiprocessor, 65536},
      {cudaDevAttrWarpSize, 32},
      {cudaDevAttrClusterLaunch, device.major >= 9},
  };
  const auto* const found =
      std::find_if(std::begin(values), std::end(values), [&](const auto& known) { return known.first == attribute; });
  if (found == std::end(values)) {
    return fail(cudaErrorInvalidValue, "the emulator does not know device attribute " + std::to_string(attribute));
  }
  *value = found->second;
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  *attributes = {};
  attributes->device = -2;  // CUDA's answer for unknown memory
  const emulator::Buffer* buffer = emulator::global_memory().find(pointer);
  if (buffer == nullptr) {
    attributes->type = cudaMemoryTypeUnregistered;
    attributes->hostPointer = const_cast<void*>(pointer);
    return cudaSuccess;
  }
  const auto elsewhere = driver().device_of.find(buffer->begin);
  attributes->type = cudaMemoryTypeDevice;
  attributes->device = elsewhere == driver().device_of.end() ? 0 : elsewhere->second;
  attributes->devicePointer = const_cast<void*>(pointer);
  return cudaSuccess;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** pointer, unsigned /*version*/,
                                             unsigned long long /*flags*/, cudaDriverEntryPointQueryResult* status) {
  return emulator::driver_entry_point(symbol, pointer, status);
}

// Newer headers do not declare it.
cudaError_t cudaGetDriverEntryPoint(const char* symbol, void** pointer, unsigned long long /*flags*/,
                                    cudaDriverEntryPointQueryResult* status) {
  return emulator::driver_entry_point(symbol, pointer, status);
}

// ---- errors ---------------------------------------------------------------------------------------------------------

cudaError_t cudaGetLastError() {
  const cudaError_t error = thread_state.last_error;
  thread_state.last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return thread_state.last_error; }

const char* cudaGetErrorName(cudaError_t error) { return emulator::name_of_error(error); }

const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaSuccess) return "no error";
  if (error != thread_state.explained_error) return "not explained: the emulator did not return this error last";
  thread_state.error_text = "emulated: " + thread_state.explanation;
  return thread_state.error_text.c_str();
}

// ---- memory and streams ---------------------------------------------------------------------------------------------

cudaError_t cudaMemsetAsync(void* begin, int value, std::size_t bytes, cudaStream_t /*stream*/) {
  const std::size_t before = driver().reports.size();
  emulator::check_range("cudaMemsetAsync", begin, bytes, /*writes=*/true, /*must_be_device=*/true);
  if (driver().reports.size() == before) std::memset(begin, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t /*stream*/) {
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  const std::size_t before = driver().reports.size();
  emulator::check_range("cudaMemcpyAsync", target, bytes, /*writes=*/true, to_device);
  emulator::check_range("cudaMemcpyAsync", source, bytes, /*writes=*/false, from_device);
  if (driver().reports.size() == before) std::memmove(target, source, bytes);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** pointer, std::size_t bytes) { return emulator::allocate("cudaMalloc", pointer, bytes); }
cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t /*stream*/) {
  return emulator::allocate("cudaMallocAsync", pointer, bytes);
}
cudaError_t cudaFree(void* pointer) { return emulator::release("cudaFree", pointer); }
cudaError_t cudaFreeAsync(void* pointer, cudaStream_t /*stream*/) {
  return emulator::release("cudaFreeAsync", pointer);
}
cudaError_t cudaDeviceSynchronize() { return emulator::record_call("cudaDeviceSynchronize"); }
cudaError_t cudaStreamSynchronize(cudaStream_t /*stream*/) { return emulator::record_call("cudaStreamSynchronize"); }
cudaError_t cudaEventSynchronize(cudaEvent_t /*event*/) { return emulator::record_call("cudaEventSynchronize"); }

cudaError_t cudaStreamIsCapturing(cudaStream_t /*stream*/, cudaStreamCaptureStatus* status) {
  *status = driver().capture != 0 ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

// Its parameters differ between the versions of CUDA; this library does not use those after the third.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* /*graph*/, const cudaGraphNode_t** /*dependencies*/,
#if CUDART_VERSION >= 13000
                                     const cudaGraphEdgeData** /*edges*/,
#endif
                                     std::size_t* /*count*/) {
  if (driver().capture != 0) *id = driver().capture;
  return cudaStreamIsCapturing(stream, status);
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  if (const cudaError_t error = emulator::refusal("cudaThreadExchangeStreamCaptureMode")) return error;
  std::swap(*mode, thread_state.capture_mode);
  return cudaSuccess;
}

}  // extern "C"
