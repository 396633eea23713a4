// Half precision, pairs of it, and rounding, as types with arithmetic.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace emulator {

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(static_cast<void*>(&to), &from, sizeof to);
  return to;
}

// Rounds to the neighbour whose last bit is set if digits were lost, so that a second rounding, to the nearest number
// of a narrower type, is exact.
inline float round_to_odd(double value) {
  float nearest = static_cast<float>(value);
  if (!std::isfinite(nearest) || static_cast<double>(nearest) == value) return nearest;
  if (std::fabs(static_cast<double>(nearest)) > std::fabs(value)) nearest = std::nextafter(nearest, 0.0f);
  return bits_as<float>(bits_as<std::uint32_t>(nearest) | 1);
}

class Half {
 public:
  static constexpr double kSmallestNormal = 6.103515625e-05;
  Half() = default;
  explicit Half(double value) {
    const auto half = static_cast<_Float16>(value);
    bits_ = std::isnan(value) ? 0x7fff : bits_as<std::uint16_t>(half);
  }
  operator float() const { return static_cast<float>(bits_as<_Float16>(bits_)); }

 private:
  std::uint16_t bits_;
};

class BFloat {
 public:
  static constexpr double kSmallestNormal = 1.1754943508222875e-38;
  BFloat() = default;
  explicit BFloat(double value) {
    const auto bits = bits_as<std::uint32_t>(round_to_odd(value));
    bits_ = std::isnan(value) ? 0x7fff : static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  operator float() const { return bits_as<float>(static_cast<std::uint32_t>(bits_) << 16); }

 private:
  std::uint16_t bits_;
};

template <typename T>
struct Pair {
  T low, high;
};

template <typename T>
constexpr double kSmallestNormal = std::numeric_limits<T>::min();
template <>
inline constexpr double kSmallestNormal<Half> = Half::kSmallestNormal;
template <>
inline constexpr double kSmallestNormal<BFloat> = BFloat::kSmallestNormal;

// .ftz: subnormal numbers count as zero of the same sign.
template <typename T>
T flush_to_zero(T value) {
  return std::fabs(static_cast<double>(value)) < kSmallestNormal<T> ? T(std::copysign(0.0, static_cast<double>(value)))
                                                                    : value;
}
inline float flush_to_zero(float value) {
  return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value;
}

// .sat: clamped to [0, 1], NaN to 0.
template <typename T>
T saturate(T value) {
  return value > T(0.0f) ? (value < T(1.0f) ? value : T(1.0f)) : T(0.0f);
}

enum class Rounding : std::uint8_t { kNearest, kZero, kDown, kUp };

// To float32 from a value of higher precision.
inline float round_float(long double value, Rounding rounding) {
  const auto nearest = static_cast<float>(value);
  if (rounding == Rounding::kNearest || static_cast<long double>(nearest) == value || std::isnan(nearest))
    return nearest;
  const bool above = static_cast<long double>(nearest) > value;
  const bool want_below = rounding == Rounding::kDown || (rounding == Rounding::kZero && value > 0);
  if (above == want_below) return std::nextafter(nearest, want_below ? -INFINITY : INFINITY);
  return nearest;
}

// The ten explicit bits of TF32, to nearest with ties away from zero (cvt.rna), or cut off as a tensor core does.
inline float truncate_tf32(float value) { return bits_as<float>(bits_as<std::uint32_t>(value) & 0xffffe000u); }
inline float round_tf32(float value) {
  if (!std::isfinite(value)) return value;
  return truncate_tf32(bits_as<float>(bits_as<std::uint32_t>(value) + 0x1000u));
}

}  // namespace emulator
