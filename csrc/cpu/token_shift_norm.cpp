// token_shift_norm on the CPU (docs/model.md#3, #4, #7, #16.3). The formula is in andromeda/token_shift_norm.h.
//
//                segment 0   segment 1   rest            A row of y goes to one row of `shifted` per segment:
//   y[t]       | a a a a a | b b b b b | c |             forward scatters it to them, backward gathers their
//                    |           |       |               gradients. No two rows write to the same place, so threads
//   shifted[t]       v           |       v               take rows in any order.
//   shifted[t+1]                 v
//
// A row is read up to three times (mean, variance, result), the later times from the first-level cache: every operand
// is read from memory once. Per call: x, residual, y and shifted forward; x, residual, dy, dshifted, dx and dresidual
// backward, where the statistics are computed again rather than stored. Memory is the limit.
// Any dim > shift, any strides of the outer dimensions.
#include "andromeda/token_shift_norm.h"

#include <cmath>

#include "andromeda/dispatch.h"
#include "andromeda/integers.h"
#include "parallel.h"
#include "rows.h"

namespace andromeda::cpu::ANDROMEDA_ISA {
namespace {

constexpr float kEpsilon = 1e-5f;
constexpr std::int64_t kTaskElements = 1 << 15;  // below this a thread costs more than it saves

// One token. `index` counts the tokens of all batch entries.
struct Token {
  std::int64_t batch, seq;
  std::int64_t offset(const RowStrides& stride) const { return batch * stride.batch + seq * stride.seq; }
  Token later(int delay) const { return {batch, seq + delay}; }
};

inline Token token_at(std::int64_t index, const TokenShiftNormParams& params) {
  return {index / params.seqlen, index % params.seqlen};
}

template <typename T>
inline T* row_of(T* data, const Token& token, const RowStrides& stride) {
  return data == nullptr ? nullptr : data + token.offset(stride);
}

// Whether segment `delay` of shifted[token] would take its row from another document, or from padding.
inline bool is_hidden(const TokenShiftNormParams& params, const Token& token, int delay) {
  if (params.key_start == nullptr) return false;
  return params.position + token.seq - delay < params.key_start[token.batch * params.seqlen + token.seq];
}

// body(begin, end, delay) for each segment, then for the rest.
template <typename Body>
inline void for_each_segment(const TokenShiftNormParams& params, const Body& body) {
  const int width = params.dim / (params.shift + 1);
  for (int delay = 0; delay <= params.shift; ++delay) body(delay * width, (delay + 1) * width, delay);
  if (const int rest = (params.shift + 1) * width; rest < params.dim) body(rest, params.dim, 0);
}

// u, the input of the norm, of one token.
template <typename T>
struct NormInput {
  const T* x;
  const T* residual;
  const float* residual_scale;
  Vec alpha;

  NormInput(const TokenShiftNormParams& params, const Token& token)
      : x(row_of(static_cast<const T*>(params.x), token, params.x_stride)),
        residual(row_of(static_cast<const T*>(params.residual), token, params.residual_stride)),
        residual_scale(params.residual_scale),
        alpha(broadcast(params.alpha)) {}

  // du / dresidual.
  Vec factor(int channel, int count) const {
    return residual_scale == nullptr ? alpha : alpha * load_up_to(residual_scale + channel, count);
  }
  Vec load(int channel, int count) const {
    const Vec branch = load_up_to(x + channel, count);
    return residual == nullptr ? branch : factor(channel, count) * load_up_to(residual + channel, count) + branch;
  }
};

struct Statistics {
  Vec mean, inverse;  // 1 / sqrt(var + epsilon)
};

template <typename T>
inline Statistics statistics_of(const NormInput<T>& input, int dim) {
  Vec sum{};
  for_each_vector(0, dim,
                  [&](int channel, int count) __attribute__((always_inline)) { sum += input.load(channel, count); });
  const Vec mean = broadcast(reduce_add(sum) / static_cast<float>(dim));
  Vec squares{};
  for_each_vector(0, dim, [&](int channel, int count) __attribute__((always_inline)) {
    const Vec centred = input.load(channel, count) - mean;
    const Vec square = centred * centred;
    squares += count < kLanes ? select(lane_index() < count, square, Vec{}) : square;
  });
  return {mean, broadcast(1.0f / std::sqrt(reduce_add(squares) / static_cast<float>(dim) + kEpsilon))};
}

template <typename T>
inline void clear(T* row, int begin, int end) {
  std::memset(row + begin, 0, (end - begin) * sizeof(T));
}

// The part of shifted[token] whose rows lie before this call.
template <typename T>
void take_history(const TokenShiftNormParams& params, const Token& token, T* shifted) {
  for_each_segment(params, [&](int begin, int end, int delay) {
    if (token.seq >= delay) return;
    if (params.history == nullptr || is_hidden(params, token, delay)) return clear(shifted, begin, end);
    const Token source = {token.batch, params.shift + token.seq - delay};
    const T* row = row_of(static_cast<const T*>(params.history), source, params.history_stride);
    std::memcpy(shifted + begin, row + begin, (end - begin) * sizeof(T));
  });
}

template <typename T>
void forward_token(const TokenShiftNormParams& params, const Token& token) {
  const NormInput<T> input(params, token);
  const bool norm = params.gamma != nullptr;
  const Statistics statistics = norm ? statistics_of(input, params.dim) : Statistics{};
  T* y = row_of(static_cast<T*>(params.y), token, params.y_stride);
  T* all_shifted = static_cast<T*>(params.shifted);
  if (all_shifted != nullptr && token.seq < params.shift) {
    take_history(params, token, row_of(all_shifted, token, params.shifted_stride));
  }
  for_each_segment(params, [&](int begin, int end, int delay) {
    T* shifted = nullptr;
    if (const Token target = token.later(delay); all_shifted != nullptr && target.seq < params.seqlen) {
      shifted = row_of(all_shifted, target, params.shifted_stride);
      if (is_hidden(params, target, delay)) {
        clear(shifted, begin, end);
        shifted = nullptr;
      }
    }
    for_each_vector(begin, end, [&](int channel, int count) __attribute__((always_inline)) {
      Vec value = input.load(channel, count);
      if (norm) {
        value = (value - statistics.mean) * statistics.inverse * (1.0f + load_up_to(params.gamma + channel, count));
      }
      if (y != nullptr) store_up_to(y + channel, value, count);
      if (shifted != nullptr) store_up_to(shifted + channel, value, count);
    });
  });
}

// With g the gradient of y from both outputs, e = g * (1 + gamma) and u_hat the normalised input:
//   du = (e - mean(e) - u_hat * mean(e * u_hat)) * inverse      dgamma += g * u_hat
//   dx = du      dresidual = factor * du      dresidual_scale += alpha * residual * du
// A row that no loss depends on (g is 0: it is padding, for instance) adds nothing to any sum, whatever it holds.
template <typename T>
void backward_token(const TokenShiftNormBackwardParams& params, const Token& token, float* dresidual_scale,
                    float* dgamma) {
  const TokenShiftNormParams& forward = params.forward;
  const NormInput<T> input(forward, token);
  const bool norm = forward.gamma != nullptr;
  const T* dy = row_of(static_cast<const T*>(params.dy), token, params.dy_stride);
  T* dx = row_of(static_cast<T*>(params.dx), token, params.dx_stride);
  T* dresidual = row_of(static_cast<T*>(params.dresidual), token, params.dresidual_stride);

  // body(channel, count, g) for each vector of the row.
  const auto for_each_gradient = [&](const auto& body) __attribute__((always_inline)) {
    for_each_segment(forward, [&](int begin, int end, int delay) __attribute__((always_inline)) {
      const T* dshifted = nullptr;
      if (const Token target = token.later(delay); target.seq < forward.seqlen && !is_hidden(forward, target, delay)) {
        dshifted = row_of(static_cast<const T*>(params.dshifted), target, params.dshifted_stride);
      }
      for_each_vector(begin, end, [&](int channel, int count) __attribute__((always_inline)) {
        Vec g{};
        if (dy != nullptr) g = load_up_to(dy + channel, count);
        if (dshifted != nullptr) g += load_up_to(dshifted + channel, count);
        body(channel, count, g);
      });
    });
  };
  const auto gain = [&](int channel, int count)
                        __attribute__((always_inline)) { return 1.0f + load_up_to(forward.gamma + channel, count); };

  Statistics statistics{};
  Vec mean_e{}, mean_product{};
  bool used = true;
  if (norm) {
    statistics = statistics_of(input, forward.dim);
    IntVec not_zero{};
    for_each_gradient([&](int channel, int count, Vec g) __attribute__((always_inline)) {
      not_zero |= g != 0.0f;
      const Vec e = g * gain(channel, count);  // 0 in the lanes after the last channel
      mean_e += e;
      mean_product += e * ((input.load(channel, count) - statistics.mean) * statistics.inverse);
    });
    mean_e = broadcast(reduce_add(mean_e) / static_cast<float>(forward.dim));
    mean_product = broadcast(reduce_add(mean_product) / static_cast<float>(forward.dim));
    used = any(not_zero);
  }
  for_each_gradient([&](int channel, int count, Vec g) __attribute__((always_inline)) {
    Vec du = g;
    if (norm && used) {
      const Vec u_hat = (input.load(channel, count) - statistics.mean) * statistics.inverse;
      du = (g * gain(channel, count) - mean_e - u_hat * mean_product) * statistics.inverse;
      if (dgamma != nullptr) store_up_to(dgamma + channel, load_up_to(dgamma + channel, count) + g * u_hat, count);
    }
    store_up_to(dx + channel, du, count);
    if (dresidual == nullptr) return;
    store_up_to(dresidual + channel, input.factor(channel, count) * du, count);
    if (dresidual_scale != nullptr) {
      const Vec product = input.alpha * load_up_to(input.residual + channel, count) * du;
      const Vec term = select(du != 0.0f, product, Vec{});
      store_up_to(dresidual_scale + channel, load_up_to(dresidual_scale + channel, count) + term, count);
    }
  });
}

inline std::int64_t num_tokens(const TokenShiftNormParams& params) {
  return static_cast<std::int64_t>(params.batch) * params.seqlen;
}

// body(run, first, last) for every run of `length` tokens; `count` runs cover them all, the last ones may be empty.
template <typename Body>
void parallel_for_runs(int num_threads, std::int64_t tokens, std::int64_t length, std::int64_t count,
                       const Body& body) {
  parallel_for(num_threads, count, [&](std::int64_t run) {
    const std::int64_t first = run * length < tokens ? run * length : tokens;
    const std::int64_t last = first + length < tokens ? first + length : tokens;
    body(run, first, last);
  });
}

template <typename T>
void forward(const TokenShiftNormParams& params, int num_threads) {
  const std::int64_t tokens = num_tokens(params), length = ceil_div(kTaskElements, params.dim);
  parallel_for_runs(num_threads, tokens, length, ceil_div(tokens, length),
                    [&](std::int64_t, std::int64_t first, std::int64_t last) {
                      for (std::int64_t index = first; index < last; ++index) {
                        forward_token<T>(params, token_at(index, params));
                      }
                    });
}

// The runs depend on num_partials alone, and so does the order of every addition.
template <typename T>
void backward(const TokenShiftNormBackwardParams& params, int num_threads) {
  const std::int64_t tokens = num_tokens(params.forward), dim = params.forward.dim;
  const auto partial = [&](float* sums, std::int64_t run) -> float* {
    if (sums == nullptr) return nullptr;
    std::memset(sums + run * dim, 0, dim * sizeof(float));
    return sums + run * dim;
  };
  parallel_for_runs(num_threads, tokens, ceil_div(tokens, params.num_partials), params.num_partials,
                    [&](std::int64_t run, std::int64_t first, std::int64_t last) {
                      float* dresidual_scale = partial(params.dresidual_scale_partial, run);
                      float* dgamma = partial(params.dgamma_partial, run);
                      for (std::int64_t index = first; index < last; ++index) {
                        backward_token<T>(params, token_at(index, params.forward), dresidual_scale, dgamma);
                      }
                    });
}

}  // namespace

void token_shift_norm_forward(const TokenShiftNormParams& params, int num_threads) {
  dispatch_dtype<StorageTypes>(params.dtype,
                               [&](auto dtype) { forward<typename decltype(dtype)::type>(params, num_threads); });
}

void token_shift_norm_backward(const TokenShiftNormBackwardParams& params, int num_threads) {
  dispatch_dtype<StorageTypes>(params.forward.dtype,
                               [&](auto dtype) { backward<typename decltype(dtype)::type>(params, num_threads); });
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
