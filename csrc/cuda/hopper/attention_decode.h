// The launch of hopper/attention_decode.cuh. Host code only.
#pragma once

#include "andromeda/attention.h"
#include "attention/decode_plan.cuh"

struct CUstream_st;

namespace andromeda::cuda::hopper {

// plan.cluster_size_log2 > 0. num_blocks: a multiple of the cluster size. num_row_tiles: 1 or 2.
void launch_attention_decode(const AttentionParams& params, const DecodePlan& plan, int num_row_tiles,
                             unsigned num_blocks, CUstream_st* stream);

}  // namespace andromeda::cuda::hopper
