// token_shift_norm (docs/model.md#3, #4, #7): residual, layer norm and token shift in one pass over memory.
//
//   u = alpha * residual_scale * residual + x                          u = x without a residual
//   y = (u - mean(u)) / sqrt(var(u) + 1e-5) * (1 + gamma)              y = u without gamma
//   shifted[t, channel] = y[t - delay(channel), channel]
//
//   channel:   0 ... width | width ... 2 * width | ... | shift * width ... | the rest     width = dim / (shift + 1)
//   delay:          0      |          1          | ... |       shift       |    0
//
// Row t - delay comes from `history` where it lies before this call, and is 0 without one. It is also 0 where it
// belongs to another document or to padding: position + t - delay < key_start[t].
#pragma once

#include <cstdint>

#include "andromeda/tensor_view.h"

struct CUstream_st;  // cudaStream_t points to it; declared here, so that this header includes none of CUDA's

namespace andromeda {

struct TokenShiftNormParams {
  const void* x;                  // (batch, seqlen, dim)
  const void* residual;           // (batch, seqlen, dim), or nullptr
  const float* residual_scale;    // (dim,), or nullptr for 1
  const float* gamma;             // (dim,), or nullptr for no norm
  const void* history;            // (batch, shift, dim): y of the tokens before, or nullptr for 0
  const std::int32_t* key_start;  // (batch, seqlen), or nullptr: no row is hidden
  void* y;                        // (batch, seqlen, dim), or nullptr; nullptr in the backward pass
  void* shifted;                  // (batch, seqlen, dim), or nullptr; nullptr in the backward pass
  RowStrides x_stride, residual_stride, history_stride, y_stride, shifted_stride;
  int batch, seqlen, dim, shift;
  std::int64_t position;  // of the first row of the call in its sequence
  float alpha;
  DType dtype;  // of x, residual, history, y and shifted
};

struct TokenShiftNormBackwardParams {
  TokenShiftNormParams forward;    // its history gets no gradient
  const void* dy;                  // (batch, seqlen, dim), or nullptr for 0
  const void* dshifted;            // (batch, seqlen, dim), or nullptr for 0
  void* dx;                        // (batch, seqlen, dim)
  void* dresidual;                 // (batch, seqlen, dim), or nullptr without a residual
  float* dresidual_scale_partial;  // (num_partials, dim), summed over the first axis by the caller; or nullptr
  float* dgamma_partial;           // (num_partials, dim), likewise
  RowStrides dy_stride, dshifted_stride, dx_stride, dresidual_stride;
  int num_partials;  // the rows are cut into this many equal runs, whatever the number of threads
};

namespace cpu {
void token_shift_norm_forward(const TokenShiftNormParams& params, int num_threads);
void token_shift_norm_backward(const TokenShiftNormBackwardParams& params, int num_threads);
}  // namespace cpu

namespace cuda {
// How many runs of the backward pass the current device works on at a time, for rows of this dim and dtype: the best
// num_partials for many tokens. More runs would need a second round that leaves part of the device idle.
int token_shift_norm_backward_runs(DType dtype, int dim);
void token_shift_norm_forward(const TokenShiftNormParams& params, CUstream_st* stream);
void token_shift_norm_backward(const TokenShiftNormBackwardParams& params, CUstream_st* stream);
}  // namespace cuda

}  // namespace andromeda
