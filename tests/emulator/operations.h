// The arithmetic of one lane, as function objects.
//
// Each is defined for all values, because lanes that do not take part are computed too. Approximations (ex2.approx and
// others) have errors of a few units in the last place on a device; here they are exact.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "numbers.h"

namespace emulator {

// ---- operations on integers

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a + b);
  }
};
struct Subtract {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a - b);
  }
};
struct Multiply {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a * b);
  }
};
struct MultiplyHigh {
  template <typename T>
  T operator()(T a, T b) const {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
  }
};
struct MultiplyAdd {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return T(a * b + c);
  }
};
struct MultiplyHighAdd {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return T(MultiplyHigh()(a, b) + c);
  }
};
struct MultiplyWide {
  std::int32_t operator()(std::int16_t a, std::int16_t b) const { return std::int32_t{a} * b; }
  std::uint32_t operator()(std::uint16_t a, std::uint16_t b) const { return std::uint32_t{a} * b; }
  std::int64_t operator()(std::int32_t a, std::int32_t b) const { return std::int64_t{a} * b; }
  std::uint64_t operator()(std::uint32_t a, std::uint32_t b) const { return std::uint64_t{a} * b; }
};
struct MultiplyWideAdd {
  template <typename T, typename W>
  W operator()(T a, T b, W c) const {
    return W(static_cast<std::make_unsigned_t<W>>(MultiplyWide()(a, b)) + c);
  }
};
struct Multiply24 {
  std::int32_t operator()(std::int32_t a, std::int32_t b) const {
    return static_cast<std::int32_t>(std::int64_t{a << 8 >> 8} * (b << 8 >> 8));
  }
  std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const { return (a & 0xffffff) * (b & 0xffffff); }
};
// By zero: all ones, as the devices do; the most negative number by -1: itself.
struct Divide {
  template <typename T>
  T operator()(T a, T b) const {
    if (b == 0) return T(-1);
    if (std::is_signed_v<T> && b == T(-1)) return T(0 - static_cast<std::make_unsigned_t<T>>(a));
    return T(a / b);
  }
};
struct Remainder {
  template <typename T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == T(-1)) return T(0);
    return T(a % b);
  }
};
struct Minimum {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? a : b;
  }
};
struct Maximum {
  template <typename T>
  T operator()(T a, T b) const {
    return a > b ? a : b;
  }
};
struct Absolute {
  template <typename T>
  T operator()(T a) const {
    return a < 0 ? T(0 - static_cast<std::make_unsigned_t<T>>(a)) : a;
  }
};
struct Negate {
  template <typename T>
  T operator()(T a) const {
    return T(0 - static_cast<std::make_unsigned_t<T>>(a));
  }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <typename T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <typename T>
  T operator()(T a) const {
    return T(~a);
  }
};
struct LogicalNot {
  template <typename T>
  T operator()(T a) const {
    return a == 0;
  }
};
// Shift amounts beyond the width clamp to it.
struct ShiftLeft {
  template <typename T>
  T operator()(T a, std::uint32_t by) const {
    return by < 8 * sizeof(T) ? T(a << by) : T(0);
  }
};
struct ShiftRight {
  template <typename T>
  T operator()(T a, std::uint32_t by) const {
    constexpr std::uint32_t kBits = 8 * sizeof(T);
    if (by < kBits) return T(a >> by);
    return a < 0 ? T(-1) : T(0);
  }
};
// shf: 32 bits out of the 64 of (b, a).
template <bool kLeft, bool kWrap>
struct FunnelShift {
  std::uint32_t operator()(std::uint32_t a, std::uint32_t b, std::uint32_t by) const {
    const std::uint32_t amount = kWrap ? by & 31 : std::min(by, 32u);
    const std::uint64_t both = std::uint64_t{b} << 32 | a;
    return static_cast<std::uint32_t>(kLeft ? both << amount >> 32 : both >> amount);
  }
};
// Bits beyond the top are filled with the sign of the field.
struct BitFieldExtract {
  template <typename T>
  T operator()(T a, std::uint32_t position, std::uint32_t length) const {
    using Bits = std::make_unsigned_t<T>;
    constexpr std::uint32_t kBits = 8 * sizeof(T);
    position &= 255;
    length &= 255;
    if (length == 0) return 0;
    const std::uint32_t there = std::min(length, kBits - std::min(position, kBits));  // bits of the field that exist
    const Bits ones = there == kBits ? Bits(-1) : Bits((Bits(1) << there) - 1);
    const Bits field = position < kBits ? Bits(Bits(a) >> position) & ones : 0;
    const bool negative = std::is_signed_v<T> && (a >> std::min(position + length - 1, kBits - 1) & 1);
    return T(negative ? field | Bits(~ones) : field);
  }
};
struct BitFieldInsert {
  template <typename T>
  T operator()(T a, T b, std::uint32_t position, std::uint32_t length) const {
    position &= 255;
    length &= 255;
    const T ones = length >= 8 * sizeof(T) ? T(-1) : T(T(1) << length) - 1;
    const T mask = ShiftLeft()(ones, position);
    return T((b & ~mask) | (ShiftLeft()(a, position) & mask));
  }
};
// lop3: the table has the result for every combination of the three bits.
struct Logic3 {
  std::uint32_t operator()(std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t table) const {
    std::uint32_t result = 0;
    for (int entry = 0; entry < 8; ++entry) {
      const std::uint32_t matches = (entry & 4 ? a : ~a) & (entry & 2 ? b : ~b) & (entry & 1 ? c : ~c);
      if (table >> entry & 1) result |= matches;
    }
    return result;
  }
};
// prmt: each nibble of the selector picks one of the eight bytes of (b, a), or its sign, eight times.
struct Permute {
  std::uint32_t operator()(std::uint32_t a, std::uint32_t b, std::uint32_t selector) const {
    const std::uint64_t bytes = std::uint64_t{b} << 32 | a;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t nibble = selector >> (4 * i) & 15;
      const auto byte = static_cast<std::uint8_t>(bytes >> (8 * (nibble & 7)));
      const std::uint32_t chosen = nibble & 8 ? (byte & 0x80 ? 0xff : 0) : byte;
      result |= chosen << (8 * i);
    }
    return result;
  }
};
struct PopulationCount {
  template <typename T>
  std::uint32_t operator()(T a) const {
    return __builtin_popcountll(static_cast<std::make_unsigned_t<T>>(a));
  }
};
struct LeadingZeros {
  template <typename T>
  std::uint32_t operator()(T a) const {
    constexpr int kSpare = 64 - 8 * sizeof(T);
    const auto bits = static_cast<std::make_unsigned_t<T>>(a);
    return bits == 0 ? 8 * sizeof(T) : __builtin_clzll(bits) - kSpare;
  }
};
struct ReverseBits {
  template <typename T>
  T operator()(T a) const {
    constexpr std::size_t kBits = 8 * sizeof(T);
    std::uint64_t result = 0;
    for (std::size_t bit = 0; bit < kBits; ++bit)
      result |= (static_cast<std::uint64_t>(a) >> bit & 1) << (kBits - 1 - bit);
    return static_cast<T>(result);
  }
};
// bfind: the position of the first bit that is not a copy of the sign.
struct FindHighest {
  template <typename T>
  std::uint32_t operator()(T a) const {
    const auto bits = static_cast<std::make_unsigned_t<T>>(a < 0 ? ~a : a);
    return bits == 0 ? 0xffffffff : 63 - __builtin_clzll(static_cast<std::uint64_t>(bits));
  }
};

// The distance of the highest bit from the top: the shift that would bring it there.
struct ShiftToHighest {
  template <typename T>
  std::uint32_t operator()(T value) const {
    const std::uint32_t position = FindHighest()(value);
    return position == ~0u ? position : 8 * sizeof(T) - 1 - position;
  }
};

// ---- operations on floating-point numbers

// A float32 result that is NaN has one pattern of bits on a GPU, whatever the operands; a CPU keeps those of an operand.
template <typename T>
T with_canonical_nan(T result) {
  if constexpr (std::is_same_v<T, float>) return result == result ? result : bits_as<float>(0x7fffffffu);
  return result;
}
struct FusedMultiplyAdd {
  float operator()(float a, float b, float c) const { return with_canonical_nan(std::fma(a, b, c)); }
  double operator()(double a, double b, double c) const { return std::fma(a, b, c); }
  template <typename T>
  T operator()(T a, T b, T c) const {
    return T(std::fma(double(float(a)), double(float(b)), double(float(c))));
  }
};
struct FloatAdd {
  template <typename T>
  T operator()(T a, T b) const {
    return with_canonical_nan(T(a + b));
  }
};
struct FloatSubtract {
  template <typename T>
  T operator()(T a, T b) const {
    return with_canonical_nan(T(a - b));
  }
};
struct FloatMultiply {
  template <typename T>
  T operator()(T a, T b) const {
    return with_canonical_nan(T(a * b));
  }
};
struct FloatDivide {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a / b);
  }
};
// Of a NaN and a number the result is the number, unless .NaN is given; -0 is less than +0.
template <bool kPropagateNan>
struct FloatMaximum {
  template <typename T>
  T operator()(T a, T b) const {
    const bool a_nan = a != a, b_nan = b != b;
    if (kPropagateNan && (a_nan || b_nan)) return T(NAN);
    if (a == b) return std::signbit(static_cast<double>(a)) ? b : a;
    return b_nan || a > b ? a : b;
  }
};
template <bool kPropagateNan>
struct FloatMinimum {
  template <typename T>
  T operator()(T a, T b) const {
    const bool a_nan = a != a, b_nan = b != b;
    if (kPropagateNan && (a_nan || b_nan)) return T(NAN);
    if (a == b) return std::signbit(static_cast<double>(a)) ? a : b;
    return b_nan || a < b ? a : b;
  }
};
struct FloatAbsolute {
  template <typename T>
  T operator()(T a) const {
    return T(std::fabs(a));
  }
};
struct FloatNegate {
  template <typename T>
  T operator()(T a) const {
    return T(-a);
  }
};
struct CopySign {  // copysign d, a, b: the sign of a, the rest of b
  template <typename T>
  T operator()(T a, T b) const {
    return std::copysign(b, a);
  }
};
struct ExponentialBase2 {
  template <typename T>
  T operator()(T a) const {
    return T(std::exp2(static_cast<float>(a)));
  }
};
struct LogarithmBase2 {
  template <typename T>
  T operator()(T a) const {
    return T(std::log2(static_cast<float>(a)));
  }
};
struct Reciprocal {
  template <typename T>
  T operator()(T a) const {
    return T(1) / a;
  }
};
struct SquareRoot {
  template <typename T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct ReciprocalSquareRoot {
  float operator()(float a) const { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
  double operator()(double a) const { return 1.0 / std::sqrt(a); }
};
struct Sine {
  template <typename T>
  T operator()(T a) const {
    return T(std::sin(static_cast<float>(a)));
  }
};
struct Cosine {
  template <typename T>
  T operator()(T a) const {
    return T(std::cos(static_cast<float>(a)));
  }
};
struct HyperbolicTangent {
  template <typename T>
  T operator()(T a) const {
    return T(std::tanh(static_cast<float>(a)));
  }
};

template <typename F, bool kFlush, bool kSaturate>
struct Modified {
  template <typename T>
  static T clean(T value) {
    return kFlush ? flush_to_zero(value) : value;
  }
  template <typename T>
  static Pair<T> clean(Pair<T> value) {
    return {clean(value.low), clean(value.high)};
  }

  template <typename T, typename... A>
  T operator()(T first, A... rest) const {
    const T result = clean(F()(clean(first), clean(rest)...));
    return kSaturate ? saturate(result) : result;
  }
  template <typename T, typename... A>
  Pair<T> operator()(Pair<T> first, A... rest) const {
    return {(*this)(first.low, rest.low...), (*this)(first.high, rest.high...)};
  }
};

// .rz, .rm, .rp of float32. A sum of products of floats fits into the 64 bits of a long double, except for extreme
// exponents.
template <typename F, Rounding kRounding>
struct Directed {
  template <typename... A>
  float operator()(A... values) const {
    return round_float(F()(static_cast<long double>(values)...), kRounding);
  }
};
struct LongMultiplyAdd {
  long double operator()(long double a, long double b, long double c) const { return a * b + c; }
};

}  // namespace emulator
