// torch.Tensor as an argument of bindings. Nothing of torch is compiled or linked in, so one build serves every torch
// version: only read_dlpack.h and read_attributes.h depend on the interface of a torch.Tensor.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "andromeda/tensor_view.h"
#include "read_attributes.h"
#include "read_dlpack.h"

namespace andromeda::bindings {

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

// Reads a torch.Tensor or Parameter. Returns false, and raises nothing, for a subclass and for what `read_tensor` refuses.
inline bool read_plain(pybind11::handle tensor, TensorView& view) {
  if (read_by_dlpack(tensor, view)) return true;
  const PlainTensors& plain = PlainTensors::get();
  if (plain.table != nullptr || !plain.is_plain(tensor)) return false;
  try {
    view = read_attributes(tensor);
    return true;
  } catch (pybind11::error_already_set&) {
  } catch (pybind11::builtin_exception&) {
  }
  return false;
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
