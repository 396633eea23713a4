// Linked in place of cuda/ when the build had no CUDA compiler.
#include <stdexcept>
#include <string>

#include "andromeda/attention.h"
#include "andromeda/cuda_status.h"
#include "andromeda/device_guard.h"
#include "andromeda/graph_capture.h"
#include "andromeda/qk_norm_rotary.h"
#include "andromeda/token_shift_norm.h"

namespace andromeda::cuda {
namespace {

constexpr char kReason[] =
    "this installation was built without CUDA kernels. With a CUDA toolkit installed, "
    "ANDROMEDA_CUDA=1 pip install -v --force-reinstall --no-deps <source folder> builds them";

[[noreturn]] void unavailable(const char* operation) {
  throw std::runtime_error(std::string(operation) + ": " + kReason);
}

}  // namespace

// Without kernels there are no launches to capture, and no runtime of this library to restrict a thread.
unsigned long long capture_id(CUstream_st*, int) { return 0; }

bool permit_work_beside_captures(bool permitted) { return permitted; }

// The call that it precedes says why there are no kernels.
DeviceGuard::DeviceGuard(int) {}
DeviceGuard::~DeviceGuard() = default;

CudaVersions cuda_versions() { return {}; }

CudaStatus cuda_status(int) { return {kReason, "", true}; }

int attention_forward_max_head_dim() { unavailable("attention_forward"); }

AttentionWorkspace attention_forward_workspace(const AttentionParams&) { unavailable("attention_forward"); }

AttentionWorkspace attention_backward_workspace(const AttentionParams&) { unavailable("attention_backward"); }

void attention_forward(const AttentionParams&, const AttentionWorkspace&, CUstream_st*) {
  unavailable("attention_forward");
}

void attention_backward(const AttentionBackwardParams&, const AttentionWorkspace&, CUstream_st*) {
  unavailable("attention_backward");
}

void qk_norm_rotary_forward(const QkNormRotaryParams&, CUstream_st*) { unavailable("qk_norm_rotary_forward"); }

void qk_norm_rotary_backward(const QkNormRotaryBackwardParams&, CUstream_st*) {
  unavailable("qk_norm_rotary_backward");
}

int qk_norm_rotary_backward_runs(DType, int, int, int) { unavailable("qk_norm_rotary_backward_runs"); }
int token_shift_norm_backward_runs(DType, int) { unavailable("token_shift_norm_backward_runs"); }

void token_shift_norm_forward(const TokenShiftNormParams&, CUstream_st*) { unavailable("token_shift_norm_forward"); }

void token_shift_norm_backward(const TokenShiftNormBackwardParams&, CUstream_st*) {
  unavailable("token_shift_norm_backward");
}

}  // namespace andromeda::cuda
