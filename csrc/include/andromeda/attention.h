// attention (SPEC 5.4-5.6): out = softmax(softmax_scale * q k^T - alibi_slopes * |i - j|) v.
//
// Positions are aligned at the end: the last query and the last key have i == j. Query i sees key j when
// j >= key_start[i] and, if causal, j <= i. A row that sees no key gives out = 0 and softmax_lse = -inf.
#pragma once

#include <cstdint>

#include "andromeda/tensor_view.h"

namespace andromeda {

struct AttentionParams {
  const void* q;                  // (batch, seqlen_q, num_heads,    head_dim)
  const void* k;                  // (batch, seqlen_k, num_kv_heads, head_dim)
  const void* v;                  // (batch, seqlen_k, num_kv_heads, head_dim)
  const float* alibi_slopes;      // (num_heads,), >= 0, or nullptr for no bias
  const float* logit_bound;       // (num_heads,): |softmax_scale * <q, k>| of visible pairs, or nullptr: unknown
  const std::int32_t* key_start;  // (batch, seqlen_q), non-decreasing along a row, or nullptr for 0
  void* out;                      // (batch, seqlen_q, num_heads,    head_dim)
  float* softmax_lse;             // (batch, num_heads, seqlen_q), natural logarithm
  SeqStrides q_stride, k_stride, v_stride, out_stride;
  int batch, seqlen_q, seqlen_k, num_heads, num_kv_heads, head_dim;
  float softmax_scale;
  bool causal;
  DType dtype;  // of q, k, v, out
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

}  // namespace andromeda
