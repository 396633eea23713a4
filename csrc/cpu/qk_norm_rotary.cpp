// qk_norm_rotary on the CPU (docs/model.md#5.2, #5.3, #16.3). The formula is in andromeda/qk_norm_rotary.h.
//
// A row is one head of one token; all heads of a token share a row of the table. A row is read twice, for its norm and
// for its result, but the second time from the cache: every operand is read from memory once.
//
//            head 0          head 1                   A task owns a run of tokens, with all their heads.
//   token  | head_dim ..... | head_dim ..... | ...    Vectors run along head_dim; the last one may be partial, and
//   token  | head_dim ..... | head_dim ..... | ...    rotary_dim may end inside a vector (never inside a pair).
//
// Bytes per call: x and out once forward; x, dout and dx once backward. About 7 operations per element, so memory is
// the limit. Any head_dim >= 1, any even rotary_dim <= head_dim, any strides of the outer dimensions.
#include "andromeda/qk_norm_rotary.h"

#include <cmath>
#include <stdexcept>

#include "andromeda/dispatch.h"
#include "andromeda/integers.h"
#include "parallel.h"
#include "rows.h"

namespace andromeda::cpu::ANDROMEDA_ISA {
namespace {

constexpr float kNormFloor = 1e-12f;
constexpr std::int64_t kTaskElements = 1 << 15;  // below this a thread costs more than it saves

enum class Direction { kForward, kTransposed };

// Rotates the lanes of x below rotary_dim by their row of the table, z * cos and z * sin alternating.
template <Direction kDirection>
inline Vec rotate(Vec x, const float* table, int channel, int rotary_dim) {
  const int count = rotary_dim - channel;
  if (count <= 0) return x;
  const Vec pairs = load_up_to(table + channel, count);
  const Vec swapped = exchange<1>(pairs);
  const IntVec odd = -(lane_index() & 1);
  const Vec z_cos = select(odd, swapped, pairs);
  const Vec z_sin = select(odd, pairs, -swapped);  // the sign is that of the first channel of a pair
  const Vec across = exchange<1>(x) * z_sin;
  const Vec rotated = kDirection == Direction::kForward ? x * z_cos + across : x * z_cos - across;
  return count < kLanes ? select(lane_index() < count, rotated, x) : rotated;
}

// The properties that all rows of an operand share.
struct RowShape {
  int head_dim, rotary_dim;
  bool normalize;
};

// numerator / max(norm, floor), and whether the norm is above the floor, where it depends on x. The multiplier of a row
// is the numerator, because a product after the division would lengthen the row's chain of dependent operations (3 %).
struct Divisor {
  float inverse;
  bool depends_on_x;
};

inline Divisor divisor_of(float sum_of_squares, bool normalize, float numerator) {
  if (!normalize) return {numerator, false};
  const float norm = std::sqrt(sum_of_squares);
  if (norm < kNormFloor) return {numerator / kNormFloor, false};
  return {numerator / norm, true};  // also for NaN, which must reach the result
}

template <typename T>
inline void forward_row(const T* x, const float* scale, const float* table, T* out, const RowShape& row,
                        float multiplier) {
  Vec squares{};
  if (row.normalize) {
    for_each_vector(0, row.head_dim, [&](int channel, int count) __attribute__((always_inline)) {
      const Vec value = load_up_to(x + channel, count);
      squares += value * value;
    });
  }
  const Vec inverse = broadcast(divisor_of(reduce_add(squares), row.normalize, multiplier).inverse);
  for_each_vector(0, row.head_dim, [&](int channel, int count) __attribute__((always_inline)) {
    Vec value = load_up_to(x + channel, count) * inverse;
    if (scale != nullptr) value *= load_up_to(scale + channel, count);
    store_up_to(out + channel, rotate<Direction::kForward>(value, table, channel, row.rotary_dim), count);
  });
}

// With g the rotated-back gradient and e = scale * g:  dscale += g * x_hat,  dx = m (e - x_hat <x_hat, e>) / norm. The
// sum for dscale gets its m when it is complete.
// A row that no loss depends on (dout is 0: a hidden key, for instance) adds nothing to dscale, whatever it holds.
template <typename T>
inline void backward_row(const T* x, const float* scale, const float* table, const T* dout, T* dx, float* dscale,
                         const RowShape& row, float multiplier) {
  const auto unscaled_gradient = [&](int channel, int count) __attribute__((always_inline)) {
    return rotate<Direction::kTransposed>(load_up_to(dout + channel, count), table, channel, row.rotary_dim);
  };
  const auto gradient = [&](Vec unscaled, int channel, int count) __attribute__((always_inline)) {
    return scale == nullptr ? unscaled : unscaled * load_up_to(scale + channel, count);
  };

  // Pass 1: ||x||^2 and <x, e>.
  Vec squares{}, products{};
  IntVec not_zero{};
  if (row.normalize) {
    for_each_vector(0, row.head_dim, [&](int channel, int count) __attribute__((always_inline)) {
      const Vec value = load_up_to(x + channel, count), unscaled = unscaled_gradient(channel, count);
      squares += value * value;
      products += value * gradient(unscaled, channel, count);
      not_zero |= unscaled != 0.0f;
    });
  }
  const bool project = row.normalize && any(not_zero);
  const Divisor divisor = divisor_of(reduce_add(squares), row.normalize, 1.0f);
  const Vec inverse = broadcast(divisor.inverse);
  // In this order: inverse may be 1e12, and its cube does not fit a float.
  const Vec along = broadcast(divisor.depends_on_x ? reduce_add(products) * divisor.inverse : 0.0f);  // <x_hat, e>
  const Vec factor = broadcast(project ? divisor.inverse * multiplier : multiplier);

  // Pass 2: both gradients.
  for_each_vector(0, row.head_dim, [&](int channel, int count) __attribute__((always_inline)) {
    const Vec unscaled = unscaled_gradient(channel, count);
    const Vec e = gradient(unscaled, channel, count);
    const Vec x_hat = load_up_to(x + channel, count) * inverse;
    if (dscale != nullptr) {
      const Vec term = select(unscaled != 0.0f, unscaled * x_hat, Vec{});
      store_up_to(dscale + channel, load_up_to(dscale + channel, count) + term, count);
    }
    store_up_to(dx + channel, (project ? e - x_hat * along : e) * factor, count);
  });
}

// One token. `index` counts the tokens of all batch entries.
struct Token {
  std::int64_t batch, seq;
  std::int64_t offset(const SeqStrides& stride) const { return batch * stride.batch + seq * stride.seq; }
};

inline Token token_at(std::int64_t index, const QkNormRotaryOperand& operand) {
  return {index / operand.seqlen, index % operand.seqlen};
}

inline const float* row_of(const float* array, std::int64_t index, int width) {
  return array == nullptr ? nullptr : array + index * width;
}

template <typename T>
void forward_tokens(const QkNormRotaryOperand& operand, const RowShape& row, std::int64_t first, std::int64_t last) {
  for (std::int64_t index = first; index < last; ++index) {
    const Token token = token_at(index, operand);
    const T* x = static_cast<const T*>(operand.x) + token.offset(operand.x_stride);
    T* out = static_cast<T*>(operand.out) + token.offset(operand.out_stride);
    const float* table = row_of(operand.table, token.seq, row.rotary_dim);
    for (int head = 0; head < operand.num_heads; ++head) {
      forward_row(x + head * operand.x_stride.head, row_of(operand.scale, head, row.head_dim), table,
                  out + head * operand.out_stride.head, row, operand.multiplier);
    }
  }
}

template <typename T>
void backward_tokens(const QkNormRotaryBackwardOperand& operand, const RowShape& row, std::int64_t first,
                     std::int64_t last, float* dscale) {
  const QkNormRotaryOperand& forward = operand.forward;
  for (std::int64_t index = first; index < last; ++index) {
    const Token token = token_at(index, forward);
    const T* x = static_cast<const T*>(forward.x) + token.offset(forward.x_stride);
    const T* dout = static_cast<const T*>(operand.dout) + token.offset(operand.dout_stride);
    T* dx = static_cast<T*>(operand.dx) + token.offset(operand.dx_stride);
    const float* table = row_of(forward.table, token.seq, row.rotary_dim);
    for (int head = 0; head < forward.num_heads; ++head) {
      backward_row(x + head * forward.x_stride.head, row_of(forward.scale, head, row.head_dim), table,
                   dout + head * operand.dout_stride.head, dx + head * operand.dx_stride.head,
                   dscale == nullptr ? nullptr : dscale + static_cast<std::int64_t>(head) * row.head_dim, row,
                   forward.multiplier);
    }
  }
}

// The tokens of an operand cut into runs of equal length, the last ones shorter or empty.
struct Runs {
  std::int64_t num_tokens, length, count;
  std::int64_t first(std::int64_t run) const { return run * length < num_tokens ? run * length : num_tokens; }
  std::int64_t last(std::int64_t run) const { return first(run + 1); }
};

inline std::int64_t num_tokens(const QkNormRotaryOperand& operand, int batch) {
  return static_cast<std::int64_t>(batch) * operand.seqlen;
}

// Runs long enough to be worth a task each.
inline Runs runs_of_work(const QkNormRotaryOperand& operand, int batch, int head_dim) {
  const std::int64_t token_elements = static_cast<std::int64_t>(operand.num_heads) * head_dim;
  const std::int64_t length = token_elements == 0 ? kTaskElements : ceil_div(kTaskElements, token_elements);
  return {num_tokens(operand, batch), length, ceil_div(num_tokens(operand, batch), length)};
}

// body(is_q, run) for every run of both operands.
template <typename Body>
void parallel_for_runs(int num_threads, const Runs& q, const Runs& k, const Body& body) {
  parallel_for(num_threads, q.count + k.count, [&](std::int64_t task) {
    if (task < q.count) {
      body(true, task);
    } else {
      body(false, task - q.count);
    }
  });
}

template <typename T>
void forward(const QkNormRotaryParams& params, int num_threads) {
  const RowShape row = {params.head_dim, params.rotary_dim, params.normalize};
  const Runs q_runs = runs_of_work(params.q, params.batch, params.head_dim);
  const Runs k_runs = runs_of_work(params.k, params.batch, params.head_dim);
  if (q_runs.count <= 1 && k_runs.count <= 1) num_threads = 1;
  parallel_for_runs(num_threads, q_runs, k_runs, [&](bool is_q, std::int64_t run) {
    const Runs& runs = is_q ? q_runs : k_runs;
    forward_tokens<T>(is_q ? params.q : params.k, row, runs.first(run), runs.last(run));
  });
}

template <typename T>
void backward(const QkNormRotaryBackwardParams& params, int num_threads) {
  const RowShape row = {params.head_dim, params.rotary_dim, params.normalize};
  const auto runs_of = [&](const QkNormRotaryBackwardOperand& operand) {
    if (operand.dscale_partial == nullptr) return runs_of_work(operand.forward, params.batch, params.head_dim);
    // The runs depend on num_partials alone, and so does the order in which gradients of scales are added.
    const std::int64_t tokens = num_tokens(operand.forward, params.batch);
    return Runs{tokens, ceil_div(tokens, params.num_partials), params.num_partials};
  };
  const Runs q_runs = runs_of(params.q), k_runs = runs_of(params.k);
  parallel_for_runs(num_threads, q_runs, k_runs, [&](bool is_q, std::int64_t run) {
    const QkNormRotaryBackwardOperand& operand = is_q ? params.q : params.k;
    const Runs& runs = is_q ? q_runs : k_runs;
    const std::int64_t size = static_cast<std::int64_t>(operand.forward.num_heads) * params.head_dim;
    float* dscale = nullptr;
    if (operand.dscale_partial != nullptr) {
      dscale = operand.dscale_partial + run * size;
      std::memset(dscale, 0, size * sizeof(float));
    }
    backward_tokens<T>(operand, row, runs.first(run), runs.last(run), dscale);
    for (std::int64_t i = 0; dscale != nullptr && i < size; ++i) dscale[i] *= operand.forward.multiplier;
  });
}

void check_folded(const QkNormRotaryOperand& q, const QkNormRotaryOperand& k) {
  if (q.factors != nullptr || k.factors != nullptr) {
    throw std::invalid_argument("qk_norm_rotary: factors must be None on the CPU; multiply the tables by them");
  }
}

}  // namespace

void qk_norm_rotary_forward(const QkNormRotaryParams& params, int num_threads) {
  check_folded(params.q, params.k);
  dispatch_dtype<StorageTypes>(params.dtype,
                               [&](auto dtype) { forward<typename decltype(dtype)::type>(params, num_threads); });
}

void qk_norm_rotary_backward(const QkNormRotaryBackwardParams& params, int num_threads) {
  check_folded(params.q.forward, params.k.forward);
  dispatch_dtype<StorageTypes>(params.dtype,
                               [&](auto dtype) { backward<typename decltype(dtype)::type>(params, num_threads); });
}

}  // namespace andromeda::cpu::ANDROMEDA_ISA
