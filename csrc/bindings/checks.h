// Checks that protect memory: without them a kernel could read or write out of bounds. andromeda/ops checks the meaning
// of a call, once, and with better messages.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <limits>
#include <optional>
#include <string>
#include <type_traits>

#include "andromeda/tensor_view.h"

namespace andromeda::bindings {

inline std::string describe(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
  }
  return "unknown";
}

inline std::string describe(const TensorView& view) {
  return view.device == Device::kCpu ? "cpu" : "cuda:" + std::to_string(view.device_index);
}

template <typename Sizes>
std::string describe_sizes(const Sizes& sizes, int count) {
  std::string text = "(";
  for (int dim = 0; dim < count; ++dim) text += (dim == 0 ? "" : ", ") + std::to_string(*(sizes.begin() + dim));
  return text + (count == 1 ? ",)" : ")");
}

inline bool is_empty(const TensorView& view) {
  for (int dim = 0; dim < view.ndim; ++dim)
    if (view.shape[dim] == 0) return true;
  return false;
}

// Checks one call. Its first tensor, the leader, decides the dtype and device of the others.
class Call {
 public:
  Call(const char* operation, const TensorView& leader, const char* leader_name = "q")
      : operation_(operation), leader_(leader), leader_name_(leader_name) {
    if (leader.dtype == DType::kInt32) type_error(leader_name, "be of a floating dtype", "int32");
  }

  [[noreturn]] void value_error(const char* name, const std::string& requirement, const std::string& got) const {
    throw pybind11::value_error(message(name, requirement, got));
  }

  [[noreturn]] void type_error(const char* name, const std::string& requirement, const std::string& got) const {
    throw pybind11::type_error(message(name, requirement, got));
  }

  std::string name() const { return operation_; }

  void dimensions(const char* name, const TensorView& view, int count) const {
    if (view.ndim != count) {
      value_error(name, "have " + std::to_string(count) + " dimensions",
                  "shape " + describe_sizes(view.shape, view.ndim));
    }
  }

  void threads(int num_threads) const {
    if (num_threads < 1) value_error("num_threads", "be at least 1", std::to_string(num_threads));
  }

  int size(const char* name, const TensorView& view, int dim) const {
    if (view.shape[dim] > std::numeric_limits<int>::max()) {
      value_error(name, "have fewer than 2^31 elements in dimension " + std::to_string(dim),
                  std::to_string(view.shape[dim]));
    }
    return static_cast<int>(view.shape[dim]);
  }

  // (batch, seqlen, num_heads, head_dim) with any strides but the last, of the leader's dtype.
  SeqStrides activations(const char* name, const TensorView& view, std::initializer_list<std::int64_t> shape) const {
    require(name, view, shape, leader_.dtype);
    dense(name, view);
    return {view.stride[0], view.stride[1], view.stride[2]};
  }

  // (batch, seqlen, dim) with any strides but the last, of the leader's dtype.
  RowStrides rows(const char* name, const TensorView& view, std::initializer_list<std::int64_t> shape) const {
    require(name, view, shape, leader_.dtype);
    dense(name, view);
    return {view.stride[0], view.stride[1]};
  }

  // A contiguous tensor of float or int32; T says which.
  template <typename T>
  T* contiguous(const char* name, const TensorView& view, std::initializer_list<std::int64_t> shape) const {
    require(name, view, shape, std::is_same_v<std::remove_const_t<T>, float> ? DType::kFloat32 : DType::kInt32);
    std::int64_t expected = 1;
    for (int dim = view.ndim - 1; dim >= 0 && !is_empty(view); --dim) {
      if (view.shape[dim] > 1 && view.stride[dim] != expected) {
        value_error(name, "be contiguous", "strides " + describe_sizes(view.stride, view.ndim));
      }
      expected *= view.shape[dim];
    }
    return static_cast<T*>(view.data);
  }

  template <typename T>
  T* contiguous(const char* name, const std::optional<TensorView>& view,
                std::initializer_list<std::int64_t> shape) const {
    return view.has_value() ? contiguous<T>(name, *view, shape) : nullptr;
  }

 private:
  void dense(const char* name, const TensorView& view) const {
    const int last = view.ndim - 1;
    if (view.shape[last] > 1 && view.stride[last] != 1 && !is_empty(view)) {
      value_error(name, "be dense in its last dimension", "stride " + std::to_string(view.stride[last]));
    }
  }

  std::string message(const char* name, const std::string& requirement, const std::string& got) const {
    return std::string(operation_) + ": " + name + " must " + requirement + ", got " + got;
  }

  void require(const char* name, const TensorView& view, std::initializer_list<std::int64_t> shape, DType dtype) const {
    bool same = view.ndim == static_cast<int>(shape.size());
    for (int dim = 0; same && dim < view.ndim; ++dim) same = view.shape[dim] == *(shape.begin() + dim);
    if (!same) {
      value_error(name, "have shape " + describe_sizes(shape, static_cast<int>(shape.size())),
                  describe_sizes(view.shape, view.ndim));
    }
    if (view.dtype != dtype) type_error(name, "be " + describe(dtype), describe(view.dtype));
    if (view.device != leader_.device || view.device_index != leader_.device_index) {
      value_error(name, "be on " + describe(leader_) + " like " + leader_name_, describe(view));
    }
  }

  const char* operation_;
  const TensorView& leader_;
  const char* leader_name_;
};

}  // namespace andromeda::bindings
