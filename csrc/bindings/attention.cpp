// Packs AttentionParams; the GIL is released while the kernel runs.
#include "andromeda/attention.h"

#include "andromeda/device_guard.h"
#include "bindings.h"
#include "checks.h"
#include "tensor_caster.h"
#include "usual_call.h"

namespace andromeda::bindings {
namespace {

namespace py = pybind11;
using OptionalTensor = std::optional<TensorView>;

AttentionWorkspace pack_workspace(const Call& call, const OptionalTensor& partials, const OptionalTensor& semaphores) {
  AttentionWorkspace workspace{};
  if (partials.has_value()) {
    call.dimensions("partials", *partials, 1);
    workspace.num_partials = partials->shape[0];
    workspace.partials = call.contiguous<float>("partials", *partials, {workspace.num_partials});
  }
  if (semaphores.has_value()) {
    call.dimensions("semaphores", *semaphores, 1);
    workspace.num_semaphores = semaphores->shape[0];
    workspace.semaphores = call.contiguous<std::int32_t>("semaphores", *semaphores, {workspace.num_semaphores});
  }
  return workspace;
}

AttentionParams pack(const Call& call, const TensorView& q, const TensorView& k, const TensorView& v,
                     const OptionalTensor& alibi_slopes, const OptionalTensor& logit_bound,
                     const OptionalTensor& key_start, const TensorView& out, const TensorView& softmax_lse, bool causal,
                     float softmax_scale, int num_threads) {
  call.threads(num_threads);
  call.dimensions("q", q, 4);
  call.dimensions("k", k, 4);
  const std::int64_t batch = q.shape[0], seqlen_q = q.shape[1], num_heads = q.shape[2], head_dim = q.shape[3];
  const std::int64_t seqlen_k = k.shape[1], num_kv_heads = k.shape[2];
  if (num_heads > 0 && (num_kv_heads == 0 || num_heads % num_kv_heads != 0)) {
    call.value_error("q.shape[2] (num_heads)", "be a multiple of k.shape[2] (num_kv_heads)",
                     std::to_string(num_heads) + " and " + std::to_string(num_kv_heads));
  }
  AttentionParams params;
  params.q_stride = call.activations("q", q, {batch, seqlen_q, num_heads, head_dim});
  params.k_stride = call.activations("k", k, {batch, seqlen_k, num_kv_heads, head_dim});
  params.v_stride = call.activations("v", v, {batch, seqlen_k, num_kv_heads, head_dim});
  params.out_stride = call.activations("out", out, {batch, seqlen_q, num_heads, head_dim});
  params.q = q.data;
  params.k = k.data;
  params.v = v.data;
  params.out = out.data;
  params.alibi_slopes = call.contiguous<const float>("alibi_slopes", alibi_slopes, {num_heads});
  params.logit_bound = call.contiguous<const float>("logit_bound", logit_bound, {num_heads});
  params.key_start = call.contiguous<const std::int32_t>("key_start", key_start, {batch, seqlen_q});
  params.softmax_lse = call.contiguous<float>("softmax_lse", softmax_lse, {batch, num_heads, seqlen_q});
  params.batch = call.size("q", q, 0);
  params.seqlen_q = call.size("q", q, 1);
  params.seqlen_k = call.size("k", k, 1);
  params.num_heads = call.size("q", q, 2);
  params.num_kv_heads = call.size("k", k, 2);
  params.head_dim = call.size("q", q, 3);
  params.softmax_scale = softmax_scale;
  params.causal = causal;
  params.dtype = q.dtype;
  params.num_keys = nullptr;
  params.num_splits = 0;
  return params;
}

void forward(const TensorView& q, const TensorView& k, const TensorView& v, const OptionalTensor& alibi_slopes,
             const OptionalTensor& logit_bound, const OptionalTensor& key_start, const TensorView& out,
             const TensorView& softmax_lse, bool causal, float softmax_scale, int num_threads,
             const OptionalTensor& partials, const OptionalTensor& semaphores, std::uintptr_t stream, int num_splits,
             const OptionalTensor& num_keys) {
  const Call call("attention_forward", q);
  AttentionParams params =
      pack(call, q, k, v, alibi_slopes, logit_bound, key_start, out, softmax_lse, causal, softmax_scale, num_threads);
  params.num_splits = num_splits;
  if (num_keys.has_value() && q.device == Device::kCpu) {
    call.value_error("num_keys", "be None on the CPU, where k and v are cut", "a tensor");
  }
  params.num_keys = call.contiguous<const std::int32_t>("num_keys", num_keys, {1});
  const AttentionWorkspace workspace = pack_workspace(call, partials, semaphores);
  if (is_empty(softmax_lse)) return;
  const py::gil_scoped_release release;
  if (q.device == Device::kCpu) {
    cpu::attention_forward(params, num_threads);
  } else {
    const cuda::DeviceGuard guard(q.device_index);
    cuda::attention_forward(params, workspace, as_stream(stream));
  }
}

void backward(const TensorView& q, const TensorView& k, const TensorView& v, const OptionalTensor& alibi_slopes,
              const OptionalTensor& logit_bound, const OptionalTensor& key_start, const TensorView& out,
              const TensorView& softmax_lse, bool causal, float softmax_scale, const TensorView& dout,
              const TensorView& dq, const TensorView& dk, const TensorView& dv, int num_threads,
              const OptionalTensor& partials, const OptionalTensor& semaphores, std::uintptr_t stream) {
  const Call call("attention_backward", q);
  AttentionBackwardParams params;
  params.forward =
      pack(call, q, k, v, alibi_slopes, logit_bound, key_start, out, softmax_lse, causal, softmax_scale, num_threads);
  const AttentionWorkspace workspace = pack_workspace(call, partials, semaphores);
  const auto shape_q = {q.shape[0], q.shape[1], q.shape[2], q.shape[3]};
  const auto shape_k = {k.shape[0], k.shape[1], k.shape[2], k.shape[3]};
  params.dout_stride = call.activations("dout", dout, shape_q);
  params.dq_stride = call.activations("dq", dq, shape_q);
  params.dk_stride = call.activations("dk", dk, shape_k);
  params.dv_stride = call.activations("dv", dv, shape_k);
  params.dout = dout.data;
  params.dq = dq.data;
  params.dk = dk.data;
  params.dv = dv.data;
  if (is_empty(dq) && is_empty(dk)) return;  // without queries dk and dv are zero and must still be written
  const py::gil_scoped_release release;
  if (q.device == Device::kCpu) {
    cpu::attention_backward(params, num_threads);
  } else {
    const cuda::DeviceGuard guard(q.device_index);
    cuda::attention_backward(params, workspace, as_stream(stream));
  }
}

bool is_usual(const py::object& q, const py::object& k, const py::object& v, const py::object& alibi_slopes,
              const py::object& logit_bound, const py::object& key_start, const py::object& num_keys) {
  const UsualCall call(q, 4);
  TensorView key, value;
  if (!call || !call.activations(k, 4, key) || !call.activations(v, 4, value)) return false;
  const auto& [batch, seqlen_q, num_heads, head_dim] = call.leader().shape;
  const std::int64_t num_kv_heads = key.shape[2];
  return key.shape[0] == batch && key.shape[3] == head_dim && head_dim > 0 && num_kv_heads > 0 &&
         num_heads % num_kv_heads == 0 && value.shape == key.shape &&
         call.constant(alibi_slopes, DType::kFloat32, {num_heads}) &&
         call.constant(logit_bound, DType::kFloat32, {num_heads}) &&
         call.constant(key_start, DType::kInt32, {batch, seqlen_q}) && call.constant(num_keys, DType::kInt32, {1});
}

// The sizes for a CUDA call of these shapes on the current device.
AttentionWorkspace workspace_sizes(AttentionWorkspace (*sizes_of)(const AttentionParams&), int batch, int seqlen_q,
                                   int seqlen_k, int num_heads, int num_kv_heads, int head_dim, bool causal,
                                   int num_splits, bool has_num_keys) {
  static constexpr std::int32_t kAnyNumber = 0;
  AttentionParams params{};
  params.batch = batch;
  params.seqlen_q = seqlen_q;
  params.seqlen_k = seqlen_k;
  params.num_heads = num_heads;
  params.num_kv_heads = num_kv_heads;
  params.head_dim = head_dim;
  params.causal = causal;
  params.dtype = DType::kBFloat16;  // every dtype with kernels has the same sizes
  params.num_splits = num_splits;
  params.num_keys = has_num_keys ? &kAnyNumber : nullptr;  // only whether it is null is read
  return sizes_of(params);
}

// (num_partials, num_semaphores, num_splits).
std::tuple<std::int64_t, std::int64_t, int> forward_workspace(int batch, int seqlen_q, int seqlen_k, int num_heads,
                                                              int num_kv_heads, int head_dim, bool causal,
                                                              int num_splits, bool has_num_keys) {
  const AttentionWorkspace sizes = workspace_sizes(&cuda::attention_forward_workspace, batch, seqlen_q, seqlen_k,
                                                   num_heads, num_kv_heads, head_dim, causal, num_splits, has_num_keys);
  return {sizes.num_partials, sizes.num_semaphores, sizes.num_splits};
}

// (num_partials, num_semaphores).
std::pair<std::int64_t, std::int64_t> backward_workspace(int batch, int seqlen_q, int seqlen_k, int num_heads,
                                                         int num_kv_heads, int head_dim, bool causal) {
  const AttentionWorkspace sizes = workspace_sizes(&cuda::attention_backward_workspace, batch, seqlen_q, seqlen_k,
                                                   num_heads, num_kv_heads, head_dim, causal, 0, false);
  return {sizes.num_partials, sizes.num_semaphores};
}

}  // namespace

void bind_attention(py::module_& m) {
  using py::arg;
  m.def("attention_forward", &forward, "csrc/include/andromeda/attention.h. Writes out and softmax_lse.", arg("q"),
        arg("k"), arg("v"), arg("alibi_slopes"), arg("logit_bound"), arg("key_start"), arg("out"), arg("softmax_lse"),
        arg("causal"), arg("softmax_scale"), arg("num_threads"), arg("partials"), arg("semaphores"), arg("stream"),
        arg("num_splits") = 0, arg("num_keys") = py::none());
  m.def("attention_backward", &backward, "csrc/include/andromeda/attention.h. Writes dq, dk and dv.", arg("q"),
        arg("k"), arg("v"), arg("alibi_slopes"), arg("logit_bound"), arg("key_start"), arg("out"), arg("softmax_lse"),
        arg("causal"), arg("softmax_scale"), arg("dout"), arg("dq"), arg("dk"), arg("dv"), arg("num_threads"),
        arg("partials"), arg("semaphores"), arg("stream"));
  m.def("attention_is_usual", &is_usual, "Whether this call is correct and needs no cast. False where it is unclear.",
        arg("q"), arg("k"), arg("v"), arg("alibi_slopes"), arg("logit_bound"), arg("key_start"), arg("num_keys"));
  const auto bind_workspace = [&m](const char* name, auto function, const auto&... further) {
    m.def(name, function,
          "Sizes of the workspace of a CUDA call on the current device: partials (float32) and semaphores (int32, "
          "zero); forward also the num_splits that they are for.",
          py::kw_only(), arg("batch"), arg("seqlen_q"), arg("seqlen_k"), arg("num_heads"), arg("num_kv_heads"),
          arg("head_dim"), arg("causal"), further...);
  };
  m.def("attention_forward_max_head_dim", &cuda::attention_forward_max_head_dim,
        "The largest head_dim of a CUDA forward call on the current device.");
  bind_workspace("attention_forward_workspace", &forward_workspace, arg("num_splits") = 0, arg("has_num_keys") = false);
  bind_workspace("attention_backward_workspace", &backward_workspace);
}

}  // namespace andromeda::bindings
