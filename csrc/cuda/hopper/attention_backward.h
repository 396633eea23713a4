// attention_backward on Hopper: the launches that attention/backward.cu calls in place of its own. Host code only.
#pragma once

#include "andromeda/attention.h"
#include "attention/backward.cuh"

namespace andromeda::cuda::hopper {

// Whether the kernels of this folder take a call: the current device is one of Hopper, and TMA can copy its tensors.
bool takes_attention_backward(const AttentionBackwardParams& params);

// After takes_attention_backward(). The first pass writes dq, and plan.tiles and plan.key_ranges for the second one,
// exactly as attention/backward_dq.cuh does. The second one writes dk and dv, or plan.partials where
// plan.num_head_splits > 1. Each makes its own tensor maps.
void launch_attention_backward_dq(const AttentionBackwardParams& params, const BackwardPlan& plan, CUstream_st* stream);
void launch_attention_backward_dkdv(const AttentionBackwardParams& params, const BackwardPlan& plan,
                                    CUstream_st* stream);

}  // namespace andromeda::cuda::hopper
