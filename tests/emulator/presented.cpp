// Presents torch's CPU tensors to the bindings as tensors of a GPU, by a DLPack table of our own around torch's. The
// cost of a call on the host, up to a launch that does nothing, can then be timed without a GPU (host_time.py).
#include "presented.h"

#include "tensor_caster.h"

namespace emulator {
namespace {

namespace dlpack = andromeda::bindings::dlpack;

const dlpack::ExchangeTable* torch_table = nullptr;

int describe_on_gpu(void* tensor, dlpack::Tensor* result) {
  const int status = torch_table->describe(tensor, result);
  result->device_type = dlpack::kCuda;
  return status;
}

}  // namespace

pybind11::object gpu_exchange_table() {
  torch_table = dlpack::table_of_torch();
  if (torch_table == nullptr) return pybind11::none();
  static dlpack::ExchangeTable table = *torch_table;
  table.describe = &describe_on_gpu;
  return pybind11::capsule(&table, "dlpack_exchange_api");
}

}  // namespace emulator
