// Which keys a query row of attention sees.
#pragma once

#include <cmath>
#include <cstdint>

#include "andromeda/attention.h"
#include "andromeda/integers.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

// Logits are in base 2 inside a kernel: softmax_scale * log2(e) is folded into q, log2(e) into the slopes.
inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// A head's constants, in base 2. Keys at the distance `window` or farther together hold less than 2^-24 of a row's
// softmax: a geometric sum of exp(2 bound - slope * distance), beside the row's own key (docs/attention.md#windows).
struct Head {
  float slope;
  float bound;          // on |logit| before the bias; infinite when unknown
  std::int64_t window;  // in tokens; kUnlimited without a bound or a bias
};

inline constexpr std::int64_t kUnlimited = std::int64_t{1} << 40;

inline Head describe_head(const AttentionParams& params, int head) {
  const float slope = params.alibi_slopes == nullptr ? 0.0f : params.alibi_slopes[head];
  Head result{slope * kLog2E, HUGE_VALF, kUnlimited};
  if (params.logit_bound == nullptr) return result;
  result.bound = params.logit_bound[head] * kLog2E;
  const double window = std::ceil((2.0 * params.logit_bound[head] + 24.0 * 0.69314718055994530942) / slope);
  if (slope > 0.0f && window < static_cast<double>(kUnlimited))
    result.window = larger(static_cast<std::int64_t>(window), 1);
  return result;
}

// One query row of one head: it sees the keys first <= j < end and is aligned with the key at `position`.
//
// describe_row() alone applies the window, key by key, so that forward, backward and any split of the keys compute the
// same function. The CUDA kernels differ: they apply it to whole tiles, in their KeyRange, and may see more keys.
struct Row {
  std::int64_t position, first, end;
  bool empty() const { return first >= end; }
  bool sees(std::int64_t key) const { return first <= key && key < end; }
  // Whether the row's own key is visible: then its weight bounds the softmax sum from below, which both the window and
  // the softmax without a running maximum rely on. Without a bias any visible key does as well.
  bool sees_itself() const { return sees(position); }
};

inline Row describe_row(const AttentionParams& params, const Head& head, std::int64_t batch, std::int64_t query) {
  Row row;
  row.position = query + params.seqlen_k - params.seqlen_q;
  row.first = params.key_start == nullptr ? 0 : larger(params.key_start[batch * params.seqlen_q + query], 0);
  row.end = params.causal ? smaller(row.position + 1, params.seqlen_k) : params.seqlen_k;
  if (row.sees_itself()) {
    row.first = larger(row.first, row.position - head.window + 1);
    row.end = smaller(row.end, row.position + head.window);
  }
  return row;
}

// Consecutive keys [begin, end); none is {0, 0}.
struct KeyRange {
  std::int64_t begin, end;
  bool empty() const { return begin >= end; }
  void include(std::int64_t first, std::int64_t last) {
    if (first >= last) return;
    *this = empty() ? KeyRange{first, last} : KeyRange{smaller(begin, first), larger(end, last)};
  }
};

}  // namespace andromeda::cpu::ANDROMEDA_ISA
