// Reads a TensorView through DLPack: torch since 2.10 hands out a table of C functions with a stable layout (dlpack.h,
// version 1.x: `DLPackExchangeAPI`), of which one describes a tensor. 50 ns.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>

#include <cstdint>

#include "andromeda/tensor_view.h"

namespace andromeda::bindings {

// The parts of DLPack's C interface that this file uses, laid out as its version 1 fixes them.
namespace dlpack {

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  std::int64_t *shape, *strides;  // strides in elements; they belong to the tensor
  std::uint64_t byte_offset;
};

struct ExchangeTable {
  std::uint32_t major, minor;
  ExchangeTable* previous;  // of an older major version
  void *allocate, *to_managed, *from_managed;
  int (*describe)(void* py_object, Tensor* result);  // may be missing; -1: a Python error is set
  void* current_stream;
};

constexpr std::int32_t kCpu = 1, kCuda = 2;
constexpr std::uint8_t kInt = 0, kFloat = 2, kBFloat = 4;

// The table of torch.Tensor; nullptr where this torch has none of version 1.
inline const ExchangeTable* table_of_torch() {
  const auto tensor_type = pybind11::module_::import("torch").attr("Tensor");
  const auto capsule = pybind11::getattr(tensor_type, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  auto* table = static_cast<ExchangeTable*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  while (table != nullptr && table->major > 1) table = table->previous;
  return table == nullptr || table->major != 1 || table->describe == nullptr ? nullptr : table;
}

}  // namespace dlpack

// The types whose objects the table describes, and the table. Subclasses may be tensors without memory of their own.
struct PlainTensors {
  PyTypeObject *tensor, *parameter;
  const dlpack::ExchangeTable* table;

  bool is_plain(pybind11::handle object) const {
    const PyTypeObject* type = Py_TYPE(object.ptr());
    return type == tensor || type == parameter;
  }

  static const PlainTensors& get() {
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<PlainTensors> plain;
    const auto make = [] {
      const auto torch = pybind11::module_::import("torch");
      const auto type = [](pybind11::object object) { return reinterpret_cast<PyTypeObject*>(object.release().ptr()); };
      return PlainTensors{type(torch.attr("Tensor")), type(torch.attr("nn").attr("Parameter")),
                          dlpack::table_of_torch()};
    };
    return plain.call_once_and_store_result(make).get_stored();
  }
};

// Returns false for every tensor that must be read by its attributes, if only to raise the error there.
inline bool read_by_dlpack(pybind11::handle tensor, TensorView& view) {
  const PlainTensors& plain = PlainTensors::get();
  if (plain.table == nullptr || !plain.is_plain(tensor)) return false;
  dlpack::Tensor found;
  if (plain.table->describe(tensor.ptr(), &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (found.type_lanes != 1 || found.ndim > kMaxDims) return false;
  if (found.type_code == dlpack::kFloat && found.type_bits == 32) {
    view.dtype = DType::kFloat32;
  } else if (found.type_code == dlpack::kBFloat && found.type_bits == 16) {
    view.dtype = DType::kBFloat16;
  } else if (found.type_code == dlpack::kFloat && found.type_bits == 16) {
    view.dtype = DType::kFloat16;
  } else if (found.type_code == dlpack::kInt && found.type_bits == 32) {
    view.dtype = DType::kInt32;
  } else {
    return false;
  }
  if (found.device_type == dlpack::kCpu) {
    view.device = Device::kCpu;
  } else if (found.device_type == dlpack::kCuda) {
    view.device = Device::kCuda;
    view.device_index = found.device_id;
  } else {
    return false;
  }
  view.data = static_cast<char*>(found.data) + found.byte_offset;
  view.ndim = found.ndim;
  bool empty = false;
  for (int dim = 0; dim < view.ndim; ++dim) {
    view.shape[dim] = found.shape[dim];
    view.stride[dim] = found.strides[dim];
    empty = empty || view.shape[dim] == 0;
  }
  return found.data != nullptr || empty;
}

}  // namespace andromeda::bindings
