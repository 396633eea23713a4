// Packs TokenShiftNormParams; the GIL is released while the kernel runs or is launched.
#include "andromeda/token_shift_norm.h"

#include "andromeda/device_guard.h"
#include "bindings.h"
#include "checks.h"
#include "tensor_caster.h"
#include "usual_call.h"

namespace andromeda::bindings {
namespace {

namespace py = pybind11;
using OptionalTensor = std::optional<TensorView>;

// Every field but the outputs and the history.
TokenShiftNormParams pack_input(const Call& call, const TensorView& x, const OptionalTensor& residual,
                                const OptionalTensor& residual_scale, const OptionalTensor& gamma,
                                const OptionalTensor& key_start, float alpha, std::int64_t shift, std::int64_t position,
                                int num_threads) {
  call.threads(num_threads);
  call.dimensions("x", x, 3);
  const std::int64_t batch = x.shape[0], seqlen = x.shape[1], dim = x.shape[2];
  if (shift < 0 || shift >= dim) {
    call.value_error("shift", "be at least 0 and less than dim=" + std::to_string(dim), std::to_string(shift));
  }
  TokenShiftNormParams params{};
  params.x = x.data;
  params.x_stride = call.rows("x", x, {batch, seqlen, dim});
  if (residual.has_value()) {
    params.residual = residual->data;
    params.residual_stride = call.rows("residual", *residual, {batch, seqlen, dim});
  }
  params.residual_scale = call.contiguous<const float>("residual_scale", residual_scale, {dim});
  params.gamma = call.contiguous<const float>("gamma", gamma, {dim});
  params.key_start = call.contiguous<const std::int32_t>("key_start", key_start, {batch, seqlen});
  params.batch = call.size("x", x, 0);
  params.seqlen = call.size("x", x, 1);
  params.dim = call.size("x", x, 2);
  params.shift = static_cast<int>(shift);
  params.position = position;
  params.alpha = alpha;
  params.dtype = x.dtype;
  return params;
}

void forward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& residual_scale,
             const OptionalTensor& gamma, const OptionalTensor& history, const OptionalTensor& key_start,
             const OptionalTensor& y, const OptionalTensor& shifted, float alpha, std::int64_t shift,
             std::int64_t position, int num_threads, std::uintptr_t stream) {
  const Call call("token_shift_norm_forward", x, "x");
  TokenShiftNormParams params =
      pack_input(call, x, residual, residual_scale, gamma, key_start, alpha, shift, position, num_threads);
  if (history.has_value()) {
    params.history = history->data;
    params.history_stride = call.rows("history", *history, {x.shape[0], shift, x.shape[2]});
  }
  if (y.has_value()) {
    params.y = y->data;
    params.y_stride = call.rows("y", *y, {x.shape[0], x.shape[1], x.shape[2]});
  }
  if (shifted.has_value()) {
    params.shifted = shifted->data;
    params.shifted_stride = call.rows("shifted", *shifted, {x.shape[0], x.shape[1], x.shape[2]});
  }
  if (is_empty(x)) return;
  const py::gil_scoped_release release;
  if (x.device == Device::kCpu) {
    cpu::token_shift_norm_forward(params, num_threads);
  } else {
    const cuda::DeviceGuard guard(x.device_index);
    cuda::token_shift_norm_forward(params, as_stream(stream));
  }
}

void backward(const TensorView& x, const OptionalTensor& residual, const OptionalTensor& residual_scale,
              const OptionalTensor& gamma, const OptionalTensor& key_start, const OptionalTensor& dy,
              const OptionalTensor& dshifted, const TensorView& dx, const OptionalTensor& dresidual,
              const OptionalTensor& dresidual_scale_partial, const OptionalTensor& dgamma_partial, float alpha,
              std::int64_t shift, std::int64_t position, int num_threads, std::uintptr_t stream) {
  const Call call("token_shift_norm_backward", x, "x");
  TokenShiftNormBackwardParams params{};
  params.forward = pack_input(call, x, residual, residual_scale, gamma, key_start, alpha, shift, position, num_threads);
  const std::int64_t batch = x.shape[0], seqlen = x.shape[1], dim = x.shape[2];
  if (dy.has_value()) {
    params.dy = dy->data;
    params.dy_stride = call.rows("dy", *dy, {batch, seqlen, dim});
  }
  if (dshifted.has_value()) {
    params.dshifted = dshifted->data;
    params.dshifted_stride = call.rows("dshifted", *dshifted, {batch, seqlen, dim});
  }
  params.dx = dx.data;
  params.dx_stride = call.rows("dx", dx, {batch, seqlen, dim});
  if (dresidual.has_value() != residual.has_value()) {
    call.value_error("residual and dresidual", "both be given or both be None", "one of them");
  }
  if (dresidual.has_value()) {
    params.dresidual = dresidual->data;
    params.dresidual_stride = call.rows("dresidual", *dresidual, {batch, seqlen, dim});
  }
  // Both sums go over the same number of runs.
  params.num_partials = 1;
  const bool of_scale = dresidual_scale_partial.has_value();
  if (const OptionalTensor& partial = of_scale ? dresidual_scale_partial : dgamma_partial; partial.has_value()) {
    const char* name = of_scale ? "dresidual_scale_partial" : "dgamma_partial";
    call.dimensions(name, *partial, 2);
    params.num_partials = call.size(name, *partial, 0);
    if (params.num_partials == 0) call.value_error(name, "have at least one partial sum", "none");
  }
  params.dresidual_scale_partial =
      call.contiguous<float>("dresidual_scale_partial", dresidual_scale_partial, {params.num_partials, dim});
  params.dgamma_partial = call.contiguous<float>("dgamma_partial", dgamma_partial, {params.num_partials, dim});
  // Without rows the partial sums are zero and must still be written.
  if (is_empty(x) && !dresidual_scale_partial.has_value() && !dgamma_partial.has_value()) return;
  const py::gil_scoped_release release;
  if (x.device == Device::kCpu) {
    cpu::token_shift_norm_backward(params, num_threads);
  } else {
    const cuda::DeviceGuard guard(x.device_index);
    cuda::token_shift_norm_backward(params, as_stream(stream));
  }
}

bool is_usual(const py::object& x, const py::object& residual, const py::object& residual_scale,
              const py::object& gamma, const py::object& history, const py::object& key_start, std::int64_t shift) {
  const UsualCall call(x, 3);
  if (!call) return false;
  const std::int64_t batch = call.leader().shape[0], seqlen = call.leader().shape[1], dim = call.leader().shape[2];
  const auto is_given = [&](py::handle tensor, std::int64_t length) {
    TensorView view;
    return tensor.is_none() || (call.activations(tensor, 3, view) && UsualCall::has_shape(view, {batch, length, dim}));
  };
  return 0 <= shift && shift < dim && is_given(residual, seqlen) && (!residual.is_none() || residual_scale.is_none()) &&
         is_given(history, shift) && call.constant(residual_scale, DType::kFloat32, {dim}) &&
         call.constant(gamma, DType::kFloat32, {dim}) && call.constant(key_start, DType::kInt32, {batch, seqlen});
}

int backward_runs(const TensorView& x) {
  const Call call("token_shift_norm_backward_runs", x, "x");
  call.dimensions("x", x, 3);
  if (x.device == Device::kCpu) call.value_error("x", "be on a CUDA device", describe(x));
  return cuda::token_shift_norm_backward_runs(x.dtype, call.size("x", x, 2));
}

}  // namespace

void bind_token_shift_norm(py::module_& m) {
  using py::arg;
  m.def("token_shift_norm_forward", &forward,
        "csrc/include/andromeda/token_shift_norm.h. Writes y and shifted, where given.", arg("x"), arg("residual"),
        arg("residual_scale"), arg("gamma"), arg("history"), arg("key_start"), arg("y"), arg("shifted"), arg("alpha"),
        arg("shift"), arg("position"), arg("num_threads"), arg("stream"));
  m.def("token_shift_norm_backward", &backward,
        "csrc/include/andromeda/token_shift_norm.h. Writes dx, dresidual and the partial sums.", arg("x"),
        arg("residual"), arg("residual_scale"), arg("gamma"), arg("key_start"), arg("dy"), arg("dshifted"), arg("dx"),
        arg("dresidual"), arg("dresidual_scale_partial"), arg("dgamma_partial"), arg("alpha"), arg("shift"),
        arg("position"), arg("num_threads"), arg("stream"));
  m.def("token_shift_norm_is_usual", &is_usual,
        "Whether the tensors of a call are correct and need no cast. False where it is unclear.", arg("x"),
        arg("residual"), arg("residual_scale"), arg("gamma"), arg("history"), arg("key_start"), arg("shift"));
  m.def("token_shift_norm_backward_runs", &backward_runs,
        "The best number of partial sums for many tokens like those of x, on a GPU.", py::kw_only(), arg("x"));
}

}  // namespace andromeda::bindings
