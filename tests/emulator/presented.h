#pragma once

#include <pybind11/pybind11.h>

namespace emulator {

// To be the attribute __dlpack_c_exchange_api__ of torch.Tensor before the bindings read their first tensor; None where
// this torch has no such table.
pybind11::object gpu_exchange_table();

}  // namespace emulator
