// What attention_forward.cpp and attention_backward.cpp share: which keys a query row sees, tiles of query rows, and
// the exponential.
//
// Logits are in base 2 inside a kernel: softmax_scale * log2(e) is folded into q, log2(e) into the slopes.
#pragma once

#include <cmath>
#include <type_traits>

#include "andromeda/attention.h"
#include "matrix.h"

namespace andromeda::cpu::ANDROMEDA_ISA {

inline constexpr int kTileQ = 96;
inline constexpr int kTileK = 192;  // deep enough that reading and writing the output around a product is lost in it
inline constexpr int kBlocks = kTileQ / kRows;  // blocks of kRows query rows in a tile
static_assert(kTileQ % kRows == 0 && kTileK % kRows == 0, "tiles are whole register blocks");
static_assert(kTileK % kCols == 0, "a tile of scores is whole panels");

inline constexpr float kLog2E = 1.44269504088896340736f;
inline constexpr float kLn2 = 0.69314718055994530942f;

// ---- exponential ----------------------------------------------------------------------------------------------------

// 2^(x + exponent), relative error below 1e-7. `exponent` is a whole number: it joins the whole part of x, so that a
// large one costs x no digits. Results below 2^-100 become exactly 0: relative to a row's largest weight they are
// beyond float32, and their products would be denormal numbers, which cost a hundred cycles each. A NaN stays a NaN.
//
// Without kVanishing the result is known to lie above 2^-100.
template <bool kVanishing = true>
inline Vec exp2(Vec x, float exponent) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
#if defined(__AVX512F__)
  const Vec rounded = (x + kRound) - kRound;
#else
  const Vec sum = x + exponent, shifted = sum + kRound;
  const Vec rounded = (shifted - kRound) - exponent;
#endif
  const Vec fraction = x - rounded;  // in [-0.5, 0.5]
  // Least largest relative error among polynomials with p(0) = 1: 2e-9, and 8e-8 with float32's roundings. One degree
  // less would save one operation of fourteen and double the error.
  Vec p = broadcast(1.5353362e-4f);
  p = p * fraction + 1.33988745e-3f;
  p = p * fraction + 9.61843736e-3f;
  p = p * fraction + 5.55033247e-2f;
  p = p * fraction + 2.40226479e-1f;
  p = p * fraction + 6.93147203e-1f;
  p = p * fraction + 1.0f;
#if defined(__AVX512F__)
  // One instruction multiplies by 2^(rounded + exponent) and clears what is too small: not-less-than keeps a NaN.
  const __m512 power = (__m512)(rounded + exponent);
  if (!kVanishing) return (Vec)_mm512_scalef_ps((__m512)p, power);
  const __mmask16 keep = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-100.0f - exponent), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(keep, (__m512)p, power);
#else
  const Vec result = p * (Vec)(((IntVec)shifted + 127) << 23);  // the exponent field of the power
  return kVanishing ? select(sum < -100.0f, Vec{}, result) : result;
#endif
}

// 2^x of one number.
inline float exp2(float x) { return exp2<true>(broadcast(x), 0.0f)[0]; }

// ---- which keys a row sees ------------------------------------------------------------------------------------------

// A head's constants, in base 2. `window`: keys at this distance or farther together hold less than 2^-24 of a row's
// softmax (docs/attention.md#windows: exp(2 bound - slope * distance), a geometric sum against the row's own key).
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

// One query row of one head: it sees keys first <= j < end, and `position` is the key it is aligned with. The window is
// applied here and nowhere else: forward, backward and any split of the keys compute the same function.
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

template <typename T>
const T* row_of(const void* tensor, const SeqStrides& stride, std::int64_t batch, std::int64_t seq, std::int64_t head) {
  return static_cast<const T*>(tensor) + batch * stride.batch + seq * stride.seq + head * stride.head;
}

template <typename T>
T* row_of(void* tensor, const SeqStrides& stride, std::int64_t batch, std::int64_t seq, std::int64_t head) {
  return static_cast<T*>(tensor) + batch * stride.batch + seq * stride.seq + head * stride.head;
}

// ---- tiles of query rows --------------------------------------------------------------------------------------------

// Consecutive keys [begin, end); empty is {0, 0}.
struct Range {
  std::int64_t begin, end;
  bool empty() const { return begin >= end; }
  void include(std::int64_t first, std::int64_t last) {
    if (first >= last) return;
    *this = empty() ? Range{first, last} : Range{smaller(begin, first), larger(end, last)};
  }
};

// kRows rows that a product computes at once: what they have in common decides which keys they skip, and which tiles
// need no mask.
struct RowBlock {
  Range seen;    // keys that some row sees
  Range common;  // keys that every row sees
  Range plain;   // those, and, if a row has a bias, at or left of its position: the bias is linear there

  void include(const Row& row, bool biased) {
    seen.include(row.first, row.end);
    const std::int64_t end = row.empty() ? 0 : row.end;
    common = {larger(common.begin, row.first), smaller(common.end, end)};
    plain = {common.begin, smaller(plain.end, biased ? smaller(end, row.position + 1) : end)};
  }
  // The part of a tile of num_keys keys from `key` on that the products must compute: whole panels on the left.
  Range columns(std::int64_t key, int num_keys) const {
    const std::int64_t begin = larger(seen.begin - key, 0) / kCols * kCols, end = smaller(seen.end - key, num_keys);
    return begin < end ? Range{begin, end} : Range{0, 0};
  }
  // Whether every row sees all that the products compute.
  bool hides_nothing(std::int64_t key, int num_keys) const {
    const Range computed = columns(key, num_keys);
    return computed.empty() || (common.begin <= key + computed.begin && key + computed.end <= common.end);
  }
  bool is_plain(std::int64_t key) const { return plain.begin <= key && key + kTileK <= plain.end; }
};

inline constexpr RowBlock kNoRows{{0, 0}, {0, kUnlimited}, {0, kUnlimited}};

}  // namespace andromeda::cpu::ANDROMEDA_ISA
