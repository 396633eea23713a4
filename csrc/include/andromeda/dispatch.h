// Turns runtime values into compile-time constants. A value that was not compiled in is an error that lists the others.
//
//   dispatch_dtype<StorageTypes>(params.dtype, [&](auto dtype) {
//     using T = typename decltype(dtype)::type;
//     launch<T>(params);
//   });
//
// Templates over the caller's own types only, and no std::string: see "Instruction sets" in csrc/README.md.
#pragma once

#include <stdexcept>

#include "andromeda/tensor_view.h"

namespace andromeda {

template <typename T>
struct TypeTag {
  using type = T;
};

// Types names how one backend stores each floating dtype: Types::Float32, Types::Float16, Types::BFloat16.
template <typename Types, typename Function>
void dispatch_dtype(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32:
      return function(TypeTag<typename Types::Float32>{});
    case DType::kFloat16:
      return function(TypeTag<typename Types::Float16>{});
    case DType::kBFloat16:
      return function(TypeTag<typename Types::BFloat16>{});
    case DType::kInt32:
      break;
  }
  throw std::invalid_argument("dtype must be one of {float32, float16, bfloat16}, got int32");
}

}  // namespace andromeda
