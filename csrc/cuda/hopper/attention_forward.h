// The forward kernel for Hopper, as attention/forward.cu sees it. Host code only.
#pragma once

#include "andromeda/attention.h"

namespace andromeda::cuda::hopper {

// Whether the kernel can run a call for many query rows on the current device, as far as the shapes say.
bool attention_forward_has_shape(const AttentionParams& params);

// Whether TMA can copy its tensors.
bool attention_forward_has_tensors(const AttentionParams& params);

inline constexpr int kMaxForwardHeadDim = 256;

// Counters in AttentionWorkspace::semaphores.
inline constexpr int kForwardSemaphores = 1;

// After both checks.
void attention_forward(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream);

}  // namespace andromeda::cuda::hopper
