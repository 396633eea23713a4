// attention (docs/model.md#5): out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v.
//
// Positions are aligned at the end: the last query and the last key have i == j. Query i sees key j when
// j >= key_start[i] and, if causal, j <= i. A row that sees no key gives out = 0 and softmax_lse = -inf.
#pragma once

#include <cstdint>

#include "andromeda/tensor_view.h"

struct CUstream_st;  // cudaStream_t points to it; declared here, so that this header includes none of CUDA's

namespace andromeda {

struct AttentionParams {
  const void* q;                  // (batch, seqlen_q, num_heads,    head_dim)
  const void* k;                  // (batch, seqlen_k, num_kv_heads, head_dim)
  const void* v;                  // (batch, seqlen_k, num_kv_heads, head_dim)
  const float* alibi_slopes;      // (num_heads,), >= 0, or nullptr for no bias
  const float* logit_bound;       // (num_heads,), on |softmax_scale * <q, k>| of visible pairs; nullptr: unknown
  const std::int32_t* key_start;  // (batch, seqlen_q), non-decreasing along a row, or nullptr for 0
  // CUDA: (1,), the number of rows of k and v that exist: the call is the one on the first num_keys of seqlen_k rows. A
  // captured graph reads it at every replay. nullptr: all exist. The kernel for many query rows does not have it.
  const std::int32_t* num_keys;
  void* out;           // (batch, seqlen_q, num_heads,    head_dim)
  float* softmax_lse;  // (batch, num_heads, seqlen_q), natural logarithm
  SeqStrides q_stride, k_stride, v_stride, out_stride;
  int batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim;
  float softmax_scale;
  bool causal;
  DType dtype;  // of q, k, v, out
  // CUDA: the number of splits of the keys in the kernel for few query rows; kNotSplit: the kernel for many query rows;
  // 0: the call chooses the fastest way.
  int num_splits;
};

struct AttentionBackwardParams {
  AttentionParams forward;  // out and softmax_lse are inputs here
  const void* dout;         // (batch, seqlen_q, num_heads,    head_dim)
  void* dq;                 // (batch, seqlen_q, num_heads,    head_dim)
  void* dk;                 // (batch, seqlen_k, num_kv_heads, head_dim)
  void* dv;                 // (batch, seqlen_k, num_kv_heads, head_dim)
  SeqStrides dout_stride, dq_stride, dk_stride, dv_stride;
};

namespace cpu {
void attention_forward(const AttentionParams& params, int num_threads);
void attention_backward(const AttentionBackwardParams& params, int num_threads);
}  // namespace cpu

// Scratch memory of one CUDA call: C++ allocates nothing. The sizes depend on shapes and on the current device.
struct AttentionWorkspace {
  float* partials;           // (num_partials,), any contents
  std::int32_t* semaphores;  // (num_semaphores,), zero before the first call; every call leaves them zero
  std::int64_t num_partials, num_semaphores;
  int num_splits;  // forward: the choice, for AttentionParams::num_splits of the call
};

namespace cuda {
// The sizes, with null pointers. The pointers, strides and scale in `params` are not read, but whether num_keys is null.
AttentionWorkspace attention_forward_workspace(const AttentionParams& params);
AttentionWorkspace attention_backward_workspace(const AttentionParams& params);

// head_dim up to kMaxAttentionHeadDim, seqlen_q and seqlen_k up to kMaxAttentionSeqlen, float16 and bfloat16,
// softmax_scale at least kMinSoftmaxScale. The tensors' device must be the current one.
//
// The forward pass takes head_dim up to attention_forward_max_head_dim(), which depends on the current device. Above
// kMaxAttentionHeadDim it must be a multiple of 8, rows of q, k and v must start at multiples of 16 bytes, no stride of
// theirs may be 0, and num_keys must be null.
int attention_forward_max_head_dim();
void attention_forward(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream);
void attention_backward(const AttentionBackwardParams& params, const AttentionWorkspace& workspace,
                        CUstream_st* stream);

inline constexpr int kNotSplit = -1;
inline constexpr int kMaxAttentionHeadDim = 128;
// Positions are ints, and tiles go up to 128 rows past the last one.
inline constexpr int kMaxAttentionSeqlen = 0x7FFFFF00;
// A bias is divided by the scale before it is added to the scores.
inline constexpr float kMinSoftmaxScale = 0x1p-60f;
}  // namespace cuda

}  // namespace andromeda
