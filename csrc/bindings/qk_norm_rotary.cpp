// Packs QkNormRotaryParams; the GIL is released while the kernel runs or is launched.
#include "andromeda/qk_norm_rotary.h"

#include <algorithm>

#include "andromeda/device_guard.h"
#include "bindings.h"
#include "checks.h"
#include "tensor_caster.h"
#include "usual_call.h"

namespace andromeda::bindings {
namespace {

namespace py = pybind11;
using OptionalTensor = std::optional<TensorView>;
using Shape = std::initializer_list<std::int64_t>;

struct OperandNames {
  const char *x, *scale, *table, *out, *dout, *dx, *dscale_partial;
};
constexpr OperandNames kQ = {"q", "q_scale", "q_table", "q_out", "dq_out", "dq", "dq_scale_partial"};
constexpr OperandNames kK = {"k", "k_scale", "k_table", "k_out", "dk_out", "dk", "dk_scale_partial"};

// The tables that both operands read, and the rows of their first tokens. From one token to the next the row in q_table
// and k_table grows by one; the row in factors grows by one for q and falls by one for k.
struct Rotation {
  const OptionalTensor &q_table, &k_table, &factors;
  std::int64_t q_row, k_row, q_factor_row, k_factor_row;
  std::int64_t rotary_dim;
  std::int64_t max_step;  // on the device, every row may lie this many tokens further on
};

// Rows `first` ... `last` of a table, in either order; returns row `first`.
const float* rows_of(const Call& call, const char* name, const OptionalTensor& table, std::int64_t width,
                     std::int64_t first, std::int64_t last) {
  if (!table.has_value()) return nullptr;
  call.dimensions(name, *table, 2);
  const float* data = call.contiguous<const float>(name, *table, {table->shape[0], width});
  if (std::min(first, last) < 0 || std::max(first, last) >= table->shape[0]) {
    call.value_error(name, "have rows " + std::to_string(first) + " to " + std::to_string(last),
                     std::to_string(table->shape[0]) + " rows");
  }
  return data + first * width;
}

// Every field of an operand but `out`.
QkNormRotaryOperand pack_input(const Call& call, const OperandNames& names, const TensorView& q, const TensorView& x,
                               const OptionalTensor& scale, float multiplier, const Rotation& rotation) {
  const bool is_q = &names == &kQ;
  call.dimensions(names.x, x, 4);
  QkNormRotaryOperand operand{};
  operand.x = x.data;
  operand.x_stride = call.activations(names.x, x, {q.shape[0], x.shape[1], x.shape[2], q.shape[3]});
  operand.scale = call.contiguous<const float>(names.scale, scale, {x.shape[2], x.shape[3]});
  operand.seqlen = call.size(names.x, x, 1);
  operand.num_heads = call.size(names.x, x, 2);
  operand.multiplier = multiplier;
  if (operand.seqlen == 0 || rotation.rotary_dim == 0) return operand;
  const std::int64_t row = is_q ? rotation.q_row : rotation.k_row, steps = operand.seqlen - 1 + rotation.max_step;
  const std::int64_t factor_row = is_q ? rotation.q_factor_row : rotation.k_factor_row;
  operand.table =
      rows_of(call, names.table, is_q ? rotation.q_table : rotation.k_table, rotation.rotary_dim, row, row + steps);
  operand.factors = rows_of(call, "factors", rotation.factors, rotation.rotary_dim / 2, factor_row,
                            is_q ? factor_row + steps : factor_row - steps);
  operand.factor_step = static_cast<int>(is_q ? rotation.rotary_dim / 2 : -(rotation.rotary_dim / 2));
  return operand;
}

// The width of the tables, which are given for both operands or for none.
int rotary_dim_of(const Call& call, const TensorView& q, const OptionalTensor& q_table, const OptionalTensor& k_table) {
  if (q_table.has_value() != k_table.has_value()) {
    call.value_error("q_table and k_table", "both be given or both be None", "one of them");
  }
  if (!q_table.has_value()) return 0;
  call.dimensions("q_table", *q_table, 2);
  if (q_table->shape[1] % 2 != 0 || q_table->shape[1] > q.shape[3]) {
    call.value_error("q_table.shape[1] (rotary_dim)", "be even and at most head_dim=" + std::to_string(q.shape[3]),
                     std::to_string(q_table->shape[1]));
  }
  return call.size("q_table", *q_table, 1);
}

void forward(const TensorView& q, const TensorView& k, const OptionalTensor& q_scale, const OptionalTensor& k_scale,
             const OptionalTensor& q_table, const OptionalTensor& k_table, const TensorView& q_out,
             const TensorView& k_out, bool normalize, int num_threads, std::uintptr_t stream, std::int64_t q_row,
             std::int64_t k_row, const OptionalTensor& factors, std::int64_t q_factor_row, std::int64_t k_factor_row,
             float q_multiplier, const OptionalTensor& step) {
  const Call call("qk_norm_rotary_forward", q);
  call.dimensions("q", q, 4);
  call.threads(num_threads);
  QkNormRotaryParams params;
  params.rotary_dim = rotary_dim_of(call, q, q_table, k_table);
  if (step.has_value() && q.device == Device::kCpu) {
    call.value_error("step", "be None on the CPU, where it is added to the rows", "a tensor");
  }
  params.step = call.contiguous<const std::int32_t>("step", step, {1});
  const std::int64_t max_step = step.has_value() ? cuda::kMaxRotaryStep : 0;
  const Rotation rotation{q_table,      k_table,      factors,           q_row,   k_row,
                          q_factor_row, k_factor_row, params.rotary_dim, max_step};
  params.q = pack_input(call, kQ, q, q, q_scale, q_multiplier, rotation);
  params.k = pack_input(call, kK, q, k, k_scale, 1.0f, rotation);
  params.q.out_stride = call.activations(kQ.out, q_out, {q.shape[0], q.shape[1], q.shape[2], q.shape[3]});
  params.k.out_stride = call.activations(kK.out, k_out, {k.shape[0], k.shape[1], k.shape[2], k.shape[3]});
  params.q.out = q_out.data;
  params.k.out = k_out.data;
  params.batch = call.size("q", q, 0);
  params.head_dim = call.size("q", q, 3);
  params.normalize = normalize;
  params.dtype = q.dtype;

  if (is_empty(q_out) && is_empty(k_out)) return;
  const py::gil_scoped_release release;
  if (q.device == Device::kCpu) {
    cpu::qk_norm_rotary_forward(params, num_threads);
  } else {
    const cuda::DeviceGuard guard(q.device_index);
    cuda::qk_norm_rotary_forward(params, as_stream(stream));
  }
}

QkNormRotaryBackwardOperand pack_backward(const Call& call, const OperandNames& names,
                                          const QkNormRotaryOperand& forward, const TensorView& x,
                                          const TensorView& dout, const TensorView& dx,
                                          const OptionalTensor& dscale_partial, std::int64_t num_partials) {
  const Shape shape = {x.shape[0], x.shape[1], x.shape[2], x.shape[3]};
  QkNormRotaryBackwardOperand operand;
  operand.forward = forward;
  operand.dout_stride = call.activations(names.dout, dout, shape);
  operand.dx_stride = call.activations(names.dx, dx, shape);
  operand.dout = dout.data;
  operand.dx = dx.data;
  operand.dscale_partial =
      call.contiguous<float>(names.dscale_partial, dscale_partial, {num_partials, x.shape[2], x.shape[3]});
  return operand;
}

void backward(const TensorView& q, const TensorView& k, const OptionalTensor& q_scale, const OptionalTensor& k_scale,
              const OptionalTensor& q_table, const OptionalTensor& k_table, const TensorView& dq_out,
              const TensorView& dk_out, const TensorView& dq, const TensorView& dk,
              const OptionalTensor& dq_scale_partial, const OptionalTensor& dk_scale_partial, bool normalize,
              int num_threads, std::uintptr_t stream, std::int64_t q_row, std::int64_t k_row,
              const OptionalTensor& factors, std::int64_t q_factor_row, std::int64_t k_factor_row, float q_multiplier) {
  const Call call("qk_norm_rotary_backward", q);
  call.dimensions("q", q, 4);
  call.threads(num_threads);
  QkNormRotaryBackwardParams params;
  params.rotary_dim = rotary_dim_of(call, q, q_table, k_table);
  const Rotation rotation{q_table, k_table, factors, q_row, k_row, q_factor_row, k_factor_row, params.rotary_dim, 0};
  // Both operands are cut into the same number of runs; without scales nothing is summed and the number is unused.
  const OptionalTensor& partial = dq_scale_partial.has_value() ? dq_scale_partial : dk_scale_partial;
  params.num_partials = 1;
  if (partial.has_value()) {
    const char* name = dq_scale_partial.has_value() ? kQ.dscale_partial : kK.dscale_partial;
    call.dimensions(name, *partial, 3);
    params.num_partials = call.size(name, *partial, 0);
    if (params.num_partials == 0) call.value_error(name, "have at least one partial sum", "none");
  }
  params.q = pack_backward(call, kQ, pack_input(call, kQ, q, q, q_scale, q_multiplier, rotation), q, dq_out, dq,
                           dq_scale_partial, params.num_partials);
  params.k = pack_backward(call, kK, pack_input(call, kK, q, k, k_scale, 1.0f, rotation), k, dk_out, dk,
                           dk_scale_partial, params.num_partials);
  params.batch = call.size("q", q, 0);
  params.head_dim = call.size("q", q, 3);
  params.normalize = normalize;
  params.dtype = q.dtype;

  // Without rows the partial sums are zero and must still be written.
  const bool nothing_to_sum = (!dq_scale_partial.has_value() || is_empty(*dq_scale_partial)) &&
                              (!dk_scale_partial.has_value() || is_empty(*dk_scale_partial));
  if (is_empty(dq) && is_empty(dk) && nothing_to_sum) return;
  const py::gil_scoped_release release;
  if (q.device == Device::kCpu) {
    cpu::qk_norm_rotary_backward(params, num_threads);
  } else {
    const cuda::DeviceGuard guard(q.device_index);
    cuda::qk_norm_rotary_backward(params, as_stream(stream));
  }
}

bool is_usual(const py::object& q, const py::object& k, const py::object& q_scale, const py::object& k_scale,
              const py::object& step) {
  const UsualCall call(q, 4);
  TensorView key;
  if (!call || !call.activations(k, 4, key)) return false;
  const auto& [batch, seqlen_q, num_heads, head_dim] = call.leader().shape;
  return key.shape[0] == batch && key.shape[3] == head_dim && head_dim > 0 &&
         call.constant(q_scale, DType::kFloat32, {num_heads, head_dim}) &&
         call.constant(k_scale, DType::kFloat32, {key.shape[2], head_dim}) && call.constant(step, DType::kInt32, {1});
}

int backward_runs(const TensorView& q, const TensorView& k) {
  const Call call("qk_norm_rotary_backward_runs", q);
  call.dimensions("q", q, 4);
  call.dimensions("k", k, 4);
  if (q.device == Device::kCpu) call.value_error("q", "be on a CUDA device", describe(q));
  return cuda::qk_norm_rotary_backward_runs(q.dtype, call.size("q", q, 3), call.size("q", q, 2), call.size("k", k, 2));
}

}  // namespace

void bind_qk_norm_rotary(py::module_& m) {
  using py::arg;
  m.def("qk_norm_rotary_forward", &forward, "csrc/include/andromeda/qk_norm_rotary.h. Writes q_out and k_out.",
        arg("q"), arg("k"), arg("q_scale"), arg("k_scale"), arg("q_table"), arg("k_table"), arg("q_out"), arg("k_out"),
        arg("normalize"), arg("num_threads"), arg("stream"), arg("q_row") = 0, arg("k_row") = 0,
        arg("factors") = py::none(), arg("q_factor_row") = 0, arg("k_factor_row") = 0, arg("q_multiplier") = 1.0f,
        arg("step") = py::none());
  m.def("qk_norm_rotary_backward", &backward,
        "csrc/include/andromeda/qk_norm_rotary.h. Writes dq, dk and the partial sums of the scales' gradients.",
        arg("q"), arg("k"), arg("q_scale"), arg("k_scale"), arg("q_table"), arg("k_table"), arg("dq_out"),
        arg("dk_out"), arg("dq"), arg("dk"), arg("dq_scale_partial"), arg("dk_scale_partial"), arg("normalize"),
        arg("num_threads"), arg("stream"), arg("q_row") = 0, arg("k_row") = 0, arg("factors") = py::none(),
        arg("q_factor_row") = 0, arg("k_factor_row") = 0, arg("q_multiplier") = 1.0f);
  m.def("qk_norm_rotary_is_usual", &is_usual,
        "Whether the tensors of a call are correct and need no cast. False where it is unclear.", arg("q"), arg("k"),
        arg("q_scale"), arg("k_scale"), arg("step"));
  m.def("qk_norm_rotary_backward_runs", &backward_runs,
        "The best number of partial sums for many tokens like those of q and k, on a GPU.", py::kw_only(), arg("q"),
        arg("k"));
}

}  // namespace andromeda::bindings
