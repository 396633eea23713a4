// Whether a call is correct and needs no cast: a quick answer for andromeda/ops, from all tensors of the call at once.
// True holds for sure, and then torch's dispatcher has nothing to do for these tensors either: they are plain ones, with
// memory that a kernel can read. Where it is false, Python examines the call again, and reports its errors or casts.
// Nothing raises.
#pragma once

#include <initializer_list>

#include "tensor_caster.h"

namespace andromeda::bindings {

class UsualCall {
 public:
  // leader: the tensor with the dtype and device of the activations.
  UsualCall(pybind11::handle leader, int ndim) {
    is_usual_ = read(leader, ndim, view_) && view_.dtype != DType::kInt32;
  }

  const TensorView& leader() const { return view_; }
  explicit operator bool() const { return is_usual_; }

  // Another tensor of activations, read into `view`.
  bool activations(pybind11::handle tensor, int ndim, TensorView& view) const {
    return read(tensor, ndim, view) && view.dtype == view_.dtype && is_on_device(view);
  }

  // A tensor, of numbers in dense rows if it is of float32, or None.
  bool constant(pybind11::handle tensor, DType dtype, std::initializer_list<std::int64_t> shape) const {
    if (tensor.is_none()) return true;
    TensorView view;
    return read_plain(tensor, view) && view.dtype == dtype && has_shape(view, shape) && is_on_device(view) &&
           (dtype == DType::kInt32 || is_dense(view));
  }

  static bool has_shape(const TensorView& view, std::initializer_list<std::int64_t> shape) {
    bool same = view.ndim == static_cast<int>(shape.size());
    for (int dim = 0; same && dim < view.ndim; ++dim) same = view.shape[dim] == *(shape.begin() + dim);
    return same;
  }

 private:
  static bool read(pybind11::handle tensor, int ndim, TensorView& view) {
    return read_plain(tensor, view) && view.ndim == ndim && is_dense(view);
  }

  // Also excludes numbers that torch negates when it reads them, as of `conj().imag`: their strides are even, except in
  // a dimension of one element, whose stride is arbitrary.
  static bool is_dense(const TensorView& view) {
    const int last = view.ndim - 1;
    return view.shape[last] > 1 && view.stride[last] == 1;
  }

  bool is_on_device(const TensorView& view) const {
    return view.device == view_.device && view.device_index == view_.device_index;
  }

  TensorView view_;
  bool is_usual_;
};

}  // namespace andromeda::bindings
