// qk_norm_rotary (docs/model.md#5.2, #5.3): normalise, scale and rotate the rows of q and k in one pass over memory.
//
//   x_hat = x / max(||x||, 1e-12)              when normalize, else x
//   x_til = x_hat * scale[head]                when scale is given
//   pairs (2t, 2t+1) with 2t < rotary_dim, at position p of the row:
//   out[2t]   = z * (x_til[2t] * cos - x_til[2t+1] * sin)     z = zeta_t ^ (+-(p - origin) / 512), + for q, - for k
//   out[2t+1] = z * (x_til[2t+1] * cos + x_til[2t] * sin)     cos, sin of p * omega_t
//   out = out * multiplier                     of q, before it is rounded
//
// The host makes the tables in double precision, because p * omega_t loses digits in float32 at large p. On the CPU z
// is folded into them: table[row][2t] = z * cos, table[row][2t+1] = z * sin. On a GPU the table of cos and sin depends
// on the position alone, and z has a table of its own, indexed by the exponent +-(p - origin). One pair of tables then
// serves every call: a captured graph needs no tables of its own, and no table that it reads is ever freed.
#pragma once

#include <cstdint>

#include "andromeda/tensor_view.h"

struct CUstream_st;  // cudaStream_t points to it; declared here, so that this header includes none of CUDA's

namespace andromeda {

// One of the two operands. The same struct serves the backward pass, which needs the raw input again.
struct QkNormRotaryOperand {
  const void* x;       // (batch, seqlen, num_heads, head_dim)
  const float* scale;  // (num_heads, head_dim), or nullptr for 1
  const float* table;  // (seqlen, rotary_dim), or nullptr when rotary_dim == 0
  // CUDA: the row of z, (rotary_dim / 2,), of the first token; the row of each next token lies factor_step elements
  // on: rotary_dim / 2 for q, whose exponent grows with the position, and minus that for k. nullptr: 1, or in `table`.
  const float* factors;
  int factor_step;
  float multiplier;  // of out; 1 for k
  void* out;         // (batch, seqlen, num_heads, head_dim); nullptr in the backward pass
  SeqStrides x_stride, out_stride;
  int seqlen, num_heads;
};

struct QkNormRotaryParams {
  QkNormRotaryOperand q, k;
  // CUDA: (1,), 0 to kMaxRotaryStep: every token lies this many positions further on than its rows of the tables say. A
  // captured graph reads it at every replay. nullptr: 0.
  const std::int32_t* step;
  int batch, head_dim, rotary_dim;
  bool normalize;
  DType dtype;  // of x and out
};

struct QkNormRotaryBackwardOperand {
  QkNormRotaryOperand forward;
  const void* dout;       // (batch, seqlen, num_heads, head_dim)
  void* dx;               // (batch, seqlen, num_heads, head_dim)
  float* dscale_partial;  // (num_partials, num_heads, head_dim), summed over the first axis by the caller; or nullptr
  SeqStrides dout_stride, dx_stride;
};

struct QkNormRotaryBackwardParams {
  QkNormRotaryBackwardOperand q, k;
  int batch, head_dim, rotary_dim;
  int num_partials;  // rows of each operand are cut into this many equal runs, whatever the number of threads
  bool normalize;
  DType dtype;  // of x, dout and dx
};

namespace cpu {
void qk_norm_rotary_forward(const QkNormRotaryParams& params, int num_threads);
void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, int num_threads);
}  // namespace cpu

namespace cuda {
// head_dim even and up to kMaxRotaryHeadDim, seqlen up to kMaxRotarySeqlen.
void qk_norm_rotary_forward(const QkNormRotaryParams& params, CUstream_st* stream);
void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, CUstream_st* stream);
// The best num_partials for many tokens: with it the larger operand has as many blocks as the device runs at a time.
int qk_norm_rotary_backward_runs(DType dtype, int head_dim, int q_heads, int k_heads);

inline constexpr int kMaxRotaryHeadDim = 512;
// A token's position in its sequence is an int, and a group counts past the end, by up to the threads of a block,
// before it wraps.
inline constexpr int kMaxRotarySeqlen = 0x7FFFFF00;
// The tables must have rows for every step: one more than the largest is the length of an xPos segment.
inline constexpr int kMaxRotaryStep = 8191;
}  // namespace cuda

}  // namespace andromeda
