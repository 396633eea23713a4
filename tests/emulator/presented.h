#pragma once

#include <pybind11/pybind11.h>

namespace emulator {

// The value for torch.Tensor.__dlpack_c_exchange_api__, to be set before the bindings read their first tensor; None
// where this torch has no such table.
pybind11::object gpu_exchange_table();

}  // namespace emulator
