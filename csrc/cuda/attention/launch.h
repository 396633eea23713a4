// Shared by the launchers of the attention kernels: checks, alignment, the grid, the choice of a variant, and the
// second kernel of attention_forward (decode.cu). Host code only.
#pragma once

#include <climits>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "alignment.h"
#include "andromeda/attention.h"
#include "andromeda/dispatch.h"
#include "andromeda/integers.h"
#include "check.cuh"
#include "load.cuh"

namespace andromeda::cuda {

// num_splits for a call: kNotSplit where the other kernel is the better one. Reads the fields that
// attention_forward_workspace may read, and num_splits where it is not 0.
int choose_num_splits(const AttentionParams& params);
// Both with num_splits > 0.
AttentionWorkspace attention_decode_workspace(const AttentionParams& params);
void attention_decode(const AttentionParams& params, const AttentionWorkspace& workspace, CUstream_st* stream);

// The checks that protect memory and the kernels' arithmetic; Python has checked the meaning of the call. Messages
// begin with `kernel`.
inline void check_attention(const AttentionParams& params, const char* kernel,
                            int max_head_dim = kMaxAttentionHeadDim) {
  const auto refuse = [&](const std::string& message) {
    throw std::invalid_argument(std::string(kernel) + ": " + message);
  };
  if (params.dtype != DType::kFloat16 && params.dtype != DType::kBFloat16) {
    refuse("dtype must be float16 or bfloat16 on CUDA; pass backend=\"reference\" for other types");
  }
  if (params.head_dim < 1 || params.head_dim > max_head_dim) {
    refuse("head_dim must be between 1 and " + std::to_string(max_head_dim) + " on CUDA, got " +
           std::to_string(params.head_dim));
  }
  if (params.num_splits < kNotSplit) {
    refuse("num_splits must be at least 0 (0: chosen), or -1, got " + std::to_string(params.num_splits));
  }
  for (const auto& [name, seqlen] : {std::pair("seqlen_q", params.seqlen_q), std::pair("seqlen_k", params.seqlen_k)}) {
    if (seqlen > kMaxAttentionSeqlen) {
      refuse(std::string(name) + " must be at most " + std::to_string(kMaxAttentionSeqlen) + " on CUDA, got " +
             std::to_string(seqlen));
    }
  }
  if (params.num_heads > 0 && (params.num_kv_heads < 1 || params.num_heads % params.num_kv_heads != 0)) {
    refuse("num_heads must be a multiple of num_kv_heads, got " + std::to_string(params.num_heads) + " and " +
           std::to_string(params.num_kv_heads));
  }
}

// Separate, because a workspace is sized without the scale. Refuses NaN too.
inline void check_softmax_scale(const AttentionParams& params, const char* kernel) {
  if (!(params.softmax_scale >= kMinSoftmaxScale)) {
    throw std::invalid_argument(std::string(kernel) + ": softmax_scale must be at least 2^-60 on CUDA, got " +
                                std::to_string(params.softmax_scale));
  }
}

// Whether all rows of one of the call's tensors, of 16-bit elements, start at a multiple of 16 bytes.
inline bool is_aligned16(const void* data, const SeqStrides& stride, int batch, int seqlen, int num_heads) {
  return is_aligned16<std::uint16_t>(data, stride, batch, seqlen, num_heads);
}

// Whether q, k, v and out of a call can all be moved in accesses of 16 bytes.
inline bool is_aligned16(const AttentionParams& params) {
  const int batch = params.batch;
  return params.head_dim % kVec16Width<std::uint16_t> == 0 &&
         is_aligned16(params.q, params.q_stride, batch, params.seqlen_q, params.num_heads) &&
         is_aligned16(params.k, params.k_stride, batch, params.seqlen_k, params.num_kv_heads) &&
         is_aligned16(params.v, params.v_stride, batch, params.seqlen_k, params.num_kv_heads) &&
         is_aligned16(params.out, params.out_stride, batch, params.seqlen_q, params.num_heads);
}

// softmax_scale * log2(e), rounded once: 2^(score * softmax_scale_log2) is the weight of a score <q, k>.
constexpr float softmax_scale_log2_of(float softmax_scale) {
  return static_cast<float>(static_cast<double>(softmax_scale) * 1.4426950408889634074);
}
// q_multiplier of qk_norm_rotary replaces all of a scale but ln(2): no score needs a product then.
static_assert(softmax_scale_log2_of(0.69314718055994530942f) == 1.0f, "exact for ln(2)");

inline float softmax_scale_log2_of(const AttentionParams& params) {
  return softmax_scale_log2_of(params.softmax_scale);
}

// The grid is one-dimensional: y and z end at 65 535.
inline unsigned checked_grid(const AttentionParams& params, const char* kernel, std::int64_t num_blocks) {
  if (num_blocks > INT_MAX) {
    throw std::invalid_argument(
        std::string(kernel) + ": batch=" + std::to_string(params.batch) +
        ", seqlen_q=" + std::to_string(params.seqlen_q) + ", seqlen_k=" + std::to_string(params.seqlen_k) +
        ", num_heads=" + std::to_string(params.num_heads) + " need " + std::to_string(num_blocks) +
        " blocks, more than a grid can have (2147483647); pass a part of the batch at a time");
  }
  return static_cast<unsigned>(num_blocks);
}

// The head_dim that the kernels are built for and that a call runs with: its rows are padded with zeros.
inline int built_head_dim(const AttentionParams& params) { return params.head_dim <= 64 ? 64 : kMaxAttentionHeadDim; }

// Calls function(TypeTag<T>) with the type of the call's tensors. After check_attention.
template <typename Function>
void dispatch_half_precision(const AttentionParams& params, const Function& function) {
  if (params.dtype == DType::kFloat16) {
    function(TypeTag<StorageTypes::Float16>{});
  } else {
    function(TypeTag<StorageTypes::BFloat16>{});
  }
}

// Calls function(TypeTag<T>, std::integral_constant<int, kHeadDim>) with built_head_dim. After check_attention.
template <typename Function>
void dispatch_attention(const AttentionParams& params, const Function& function) {
  dispatch_half_precision(params, [&](auto dtype) {
    if (built_head_dim(params) == 64) {
      function(dtype, std::integral_constant<int, 64>{});
    } else {
      function(dtype, std::integral_constant<int, kMaxAttentionHeadDim>{});
    }
  });
}

}  // namespace andromeda::cuda
