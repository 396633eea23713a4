// Runtime values to compile-time constants. A value that was not compiled is an error that lists those that were.
//
//   dispatch_dtype<StorageTypes>(params.dtype, [&](auto dtype) {
//     using T = typename decltype(dtype)::type;
//     dispatch_bool(params.causal, [&](auto causal) { launch<T, causal()>(params); });
//   });
//
// Templates over the caller's own types only, and no std::string: see "instruction sets" in csrc/README.md.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <type_traits>

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
    default:
      throw std::invalid_argument("dtype must be one of {float32, float16, bfloat16}");
  }
}

template <typename Function>
void dispatch_bool(bool value, const Function& function) {
  value ? function(std::true_type{}) : function(std::false_type{});
}

// dispatch_int<32, 64, 128>("head_dim", params.head_dim, [&](auto head_dim) { launch<head_dim()>(params); });
template <int... kValues, typename Function>
void dispatch_int(const char* name, int value, const Function& function) {
  const bool known = ((value == kValues && (function(std::integral_constant<int, kValues>{}), true)) || ...);
  if (known) return;
  char message[256];
  int length = std::snprintf(message, sizeof message, "%s must be one of {", name);
  const char* separator = "";
  for (const int choice : {kValues...}) {
    length += std::snprintf(message + length, sizeof message - length, "%s%d", separator, choice);
    separator = ", ";
  }
  std::snprintf(message + length, sizeof message - length, "}, got %d", value);
  throw std::invalid_argument(message);
}

}  // namespace andromeda
