// The only file that knows what a torch.Tensor looks like. Nothing of torch is compiled or linked in, so one build
// serves every torch version. A TensorView is read in one of two ways:
//
//   DLPack      torch since 2.10 hands out a table of C functions with a stable layout (dlpack.h, version 1.x:
//               `DLPackExchangeAPI`), of which one describes a tensor: 50 ns
//   attributes  of any object that has those of a tensor: 400 ns of a torch.Tensor, 10 us of a subclass. It gives the
//               errors, too.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "andromeda/tensor_view.h"

namespace andromeda::bindings {

// Attribute names, interned once, and the dtype objects: torch has one object per dtype, compared by identity.
struct TorchNames {
  pybind11::str data_ptr = intern("data_ptr"), dtype = intern("dtype"), shape = intern("shape"),
                stride = intern("stride"), is_cpu = intern("is_cpu"), is_cuda = intern("is_cuda"),
                get_device = intern("get_device"), device = intern("device");
  pybind11::object float32, float16, bfloat16, int32;

  TorchNames() {
    const auto torch = pybind11::module_::import("torch");
    float32 = torch.attr("float32");
    float16 = torch.attr("float16");
    bfloat16 = torch.attr("bfloat16");
    int32 = torch.attr("int32");
  }

  static pybind11::str intern(const char* name) {
    return pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(name));
  }

  static const TorchNames& get() {
    // Kept until the process ends: at interpreter exit there is no safe moment to release Python objects.
    PYBIND11_CONSTINIT static pybind11::gil_safe_call_once_and_store<TorchNames> names;
    return names.call_once_and_store_result([] { return TorchNames(); }).get_stored();
  }
};

inline pybind11::object checked(PyObject* owned) {
  if (owned == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(owned);
}

inline pybind11::object attribute(pybind11::handle object, const pybind11::str& name) {
  return checked(PyObject_GetAttr(object.ptr(), name.ptr()));
}

inline pybind11::object call(pybind11::handle object, const pybind11::str& name) {
  return checked(PyObject_CallMethodNoArgs(object.ptr(), name.ptr()));
}

inline std::int64_t integer(pybind11::handle value) {
  const long long result = PyLong_AsLongLong(value.ptr());
  if (result == -1 && PyErr_Occurred() != nullptr) throw pybind11::error_already_set();
  return result;
}

[[noreturn]] inline void refuse(const std::string& requirement, pybind11::handle got) {
  throw pybind11::type_error("expected " + requirement + ", got " + std::string(pybind11::str(got)));
}

// ---- by DLPack ------------------------------------------------------------------------------------------------------

// What this file needs of DLPack's C interface, laid out as its version 1 fixes it.
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

// Of torch.Tensor; nullptr where this torch has none of version 1.
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

// False for everything that is to be read by attributes, if only for the sake of their errors.
inline bool read_by_dlpack(pybind11::handle tensor, TensorView& view) {
  const PlainTensors& plain = PlainTensors::get();
  const PyTypeObject* type = Py_TYPE(tensor.ptr());
  if (plain.table == nullptr || (type != plain.tensor && type != plain.parameter)) return false;
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

// ---- by attributes --------------------------------------------------------------------------------------------------

inline TensorView read_attributes(pybind11::handle tensor) {
  const TorchNames& torch = TorchNames::get();
  TensorView view;
  view.data = PyLong_AsVoidPtr(call(tensor, torch.data_ptr).ptr());
  if (PyErr_Occurred() != nullptr) throw pybind11::error_already_set();

  const auto dtype = attribute(tensor, torch.dtype);
  if (dtype.is(torch.float32)) {
    view.dtype = DType::kFloat32;
  } else if (dtype.is(torch.bfloat16)) {
    view.dtype = DType::kBFloat16;
  } else if (dtype.is(torch.float16)) {
    view.dtype = DType::kFloat16;
  } else if (dtype.is(torch.int32)) {
    view.dtype = DType::kInt32;
  } else {
    refuse("a tensor of dtype float32, float16, bfloat16 or int32", dtype);
  }

  if (attribute(tensor, torch.is_cpu).ptr() == Py_True) {
    view.device = Device::kCpu;
  } else if (attribute(tensor, torch.is_cuda).ptr() == Py_True) {
    view.device = Device::kCuda;
    view.device_index = static_cast<int>(integer(call(tensor, torch.get_device)));
  } else {
    refuse("a tensor on a cpu or cuda device", attribute(tensor, torch.device));
  }

  const auto shape = attribute(tensor, torch.shape), stride = call(tensor, torch.stride);
  if (!PyTuple_Check(shape.ptr()) || !PyTuple_Check(stride.ptr()) ||
      PyTuple_GET_SIZE(shape.ptr()) != PyTuple_GET_SIZE(stride.ptr())) {
    refuse("a tensor whose shape and stride() are tuples of one length", pybind11::type::handle_of(tensor));
  }
  view.ndim = static_cast<int>(PyTuple_GET_SIZE(shape.ptr()));
  if (view.ndim > kMaxDims) refuse("a tensor of at most " + std::to_string(kMaxDims) + " dimensions", shape);
  bool empty = false;
  for (int dim = 0; dim < view.ndim; ++dim) {
    view.shape[dim] = integer(PyTuple_GET_ITEM(shape.ptr(), dim));
    view.stride[dim] = integer(PyTuple_GET_ITEM(stride.ptr(), dim));
    empty = empty || view.shape[dim] == 0;
  }

  if (view.data == nullptr && !empty) {
    refuse("a tensor that has memory", pybind11::type::handle_of(tensor));  // fake, or freed by resize_
  }
  return view;
}

inline TensorView read_tensor(pybind11::handle tensor) {
  TensorView view;
  if (read_by_dlpack(tensor, view)) return view;
  try {
    return read_attributes(tensor);
  } catch (pybind11::error_already_set& error) {
    if (!error.matches(PyExc_AttributeError)) throw;
  }
  refuse("a torch.Tensor", tensor.is_none() ? tensor : pybind11::type::handle_of(tensor));
}

}  // namespace andromeda::bindings

namespace pybind11::detail {

template <>
struct type_caster<andromeda::TensorView> {
  PYBIND11_TYPE_CASTER(andromeda::TensorView, const_name("torch.Tensor"));

  // Throws instead of returning false: pybind11's own message would print every tensor of the call.
  bool load(handle source, bool /*convert*/) {
    value = andromeda::bindings::read_tensor(source);
    return true;
  }
};

}  // namespace pybind11::detail
