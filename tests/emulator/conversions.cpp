// mov, with packing and unpacking of registers, and cvt.
#include <algorithm>
#include <cmath>

#include "numbers.h"
#include "rows.h"

namespace emulator {
namespace {

// ---- mov

struct Identity {
  template <typename T>
  T operator()(T a) const {
    return a;
  }
};

// mov {a, b}, c: elements from the low bytes up
Step unpack(Execution& x, const Instruction& i) {
  const std::vector<Operand>& parts = i.operands[0].elements;
  x.for_each_lane([&](int lane) {
    const std::uint64_t bits = x.lane_bits(i.operands[1], lane);
    int shift = 0;
    for (const Operand& part : parts) {
      x.set_lane_bits(part, lane, bits >> shift);
      shift += 8 * i.option[0];
    }
  });
  return Step::kNext;
}

Step pack(Execution& x, const Instruction& i) {
  const std::vector<Operand>& parts = i.operands[1].elements;
  x.for_each_lane([&](int lane) {
    std::uint64_t bits = 0;
    int shift = 0;
    for (const Operand& part : parts) {
      bits |= x.lane_bits(part, lane) << shift;
      shift += 8 * i.option[0];
    }
    x.set_lane_bits(i.operands[0], lane, bits);
  });
  return Step::kNext;
}

template <typename F>
Handler by_bytes(Decoder& d, int bytes) {
  switch (bytes) {
    case 2:
      return &map<F, std::uint16_t, std::uint16_t>;
    case 4:
      return &map<F, std::uint32_t, std::uint32_t>;
    case 8:
      return &map<F, std::uint64_t, std::uint64_t>;
    default:
      d.fail("this width is not supported here");
  }
}

void decode_move(Decoder& d) {
  const Type type = d.take_type();
  const int bytes = bytes_of(type);
  for (const std::size_t vector : {0, 1}) {
    if (d.operand(vector).kind != Operand::Kind::kVector) continue;
    std::vector<Operand>& parts = d.operand(vector).elements;
    const int part_bytes = bytes / static_cast<int>(parts.size());
    if (bytes > 8 || part_bytes < 2) d.fail("this width is not supported here");
    for (Operand& part : parts) d.place(part, part_bytes);
    d.source(1 - vector, bytes);
    d.instruction.option[0] = part_bytes;
    d.instruction.handler = vector == 0 ? &unpack : &pack;
    return;
  }
  d.source(0, bytes);
  d.source(1, bytes);
  d.instruction.handler = by_bytes<Identity>(d, bytes);
}

// ---- cvt

struct Conversion {
  enum Mode { kNone, kNearestEven, kToZero, kDown, kUp, kNearestAway };
};

double load_float(Type type, std::uint64_t bits) {
  switch (type) {
    case Type::kF16:
      return bits_as<Half>(static_cast<std::uint16_t>(bits));
    case Type::kBF16:
      return bits_as<BFloat>(static_cast<std::uint16_t>(bits));
    case Type::kF32:
      return bits_as<float>(static_cast<std::uint32_t>(bits));
    default:
      return bits_as<double>(bits);
  }
}

double round_integral(double value, int mode) {
  switch (mode) {
    case Conversion::kNearestEven:
      return std::nearbyint(value);
    case Conversion::kToZero:
      return std::trunc(value);
    case Conversion::kDown:
      return std::floor(value);
    case Conversion::kUp:
      return std::ceil(value);
    default:
      return value;
  }
}

std::uint64_t store_float(Type type, long double value, int mode) {
  const Rounding rounding = mode == Conversion::kToZero ? Rounding::kZero
                            : mode == Conversion::kDown ? Rounding::kDown
                            : mode == Conversion::kUp   ? Rounding::kUp
                                                        : Rounding::kNearest;
  switch (type) {
    case Type::kF16:
      return bits_as<std::uint16_t>(Half(static_cast<double>(value)));
    case Type::kBF16:
      if (mode == Conversion::kToZero) {
        return bits_as<std::uint32_t>(round_float(value, Rounding::kZero)) >> 16;
      }
      return bits_as<std::uint16_t>(BFloat(static_cast<double>(value)));
    case Type::kTF32:
      return bits_as<std::uint32_t>(round_tf32(static_cast<float>(value)));
    case Type::kF32:
      return bits_as<std::uint32_t>(round_float(value, rounding));
    default:
      return bits_as<std::uint64_t>(static_cast<double>(value));
  }
}

// To an integer type; out of range: its nearest limit, NaN: zero.
std::uint64_t clamp_to_integer(Type type, long double value) {
  const int bits = 8 * bytes_of(type);
  const long double low = is_signed(type) ? -std::ldexp(1.0L, bits - 1) : 0.0L;
  const long double high = std::ldexp(1.0L, is_signed(type) ? bits - 1 : bits) - 1.0L;
  if (std::isnan(value)) return 0;
  value = std::min(std::max(value, low), high);
  return is_signed(type) ? static_cast<std::uint64_t>(static_cast<std::int64_t>(value))
                         : static_cast<std::uint64_t>(value);
}

// option: to, from, integral rounding, rounding of the result, sat, ftz
Step convert(Execution& x, const Instruction& i) {
  const auto to = static_cast<Type>(i.option[0]), from = static_cast<Type>(i.option[1]);
  x.for_each_lane([&](int lane) {
    const int shift = 64 - 8 * bytes_of(from);
    const std::uint64_t low = x.lane_bits(i.operands[1], lane) << shift;
    const std::uint64_t source = is_signed(from) ? std::uint64_t(std::int64_t(low) >> shift) : low >> shift;
    std::uint64_t result = source;
    if (is_float(from)) {
      double value = load_float(from, source);
      if (i.option[5] && std::fabs(value) < kSmallestNormal<float>) value = std::copysign(0.0, value);
      value = round_integral(value, i.option[2]);
      if (i.option[4] && is_float(to)) value = saturate(value);
      result = is_float(to) || to == Type::kTF32 ? store_float(to, value, i.option[3]) : clamp_to_integer(to, value);
    } else if (is_float(to)) {
      const long double value = is_signed(from) ? static_cast<long double>(static_cast<std::int64_t>(source)) : source;
      result = store_float(to, i.option[4] ? saturate(value) : value, i.option[3]);
    } else if (i.option[4]) {
      result =
          clamp_to_integer(to, is_signed(from) ? static_cast<long double>(static_cast<std::int64_t>(source)) : source);
    }
    // A register that is wider than the type is filled with the sign or with zeros.
    const int spare = 64 - 8 * bytes_of(to);
    result = is_signed(to) ? std::uint64_t(std::int64_t(result << spare) >> spare) : result << spare >> spare;
    x.set_lane_bits(i.operands[0], lane, result);
  });
  return Step::kNext;
}

// cvt d, a, b to two halves: a is the high one
template <typename T, bool kRelu>
struct PackHalves {
  static float positive(float value) { return kRelu && !(value > 0.0f) ? (value != value ? value : 0.0f) : value; }
  Pair<T> operator()(float high, float low) const { return {T(positive(low)), T(positive(high))}; }
};

template <typename To>
struct Cast {
  template <typename From>
  To operator()(From value) const {
    return static_cast<To>(value);
  }
};

// The conversions that are frequent in inner loops, without the general cases of `convert`.
Handler common_conversion(Type to, Type from) {
  if (to == Type::kF32 && from == Type::kS32) return &map<Cast<float>, float, std::int32_t>;
  if (to == Type::kF32 && from == Type::kU32) return &map<Cast<float>, float, std::uint32_t>;
  if (to == Type::kF32 && from == Type::kF16) return &map<Cast<float>, float, Half>;
  if (to == Type::kF32 && from == Type::kBF16) return &map<Cast<float>, float, BFloat>;
  if (to == Type::kF16 && from == Type::kF32) return &map<Cast<Half>, Half, float>;
  if (to == Type::kBF16 && from == Type::kF32) return &map<Cast<BFloat>, BFloat, float>;
  if ((to == Type::kU64 || to == Type::kS64) && from == Type::kU32)
    return &map<Cast<std::uint64_t>, std::uint64_t, std::uint32_t>;
  if ((to == Type::kU64 || to == Type::kS64) && from == Type::kS32)
    return &map<Cast<std::int64_t>, std::int64_t, std::int32_t>;
  if ((to == Type::kU32 || to == Type::kS32) && (from == Type::kU64 || from == Type::kS64)) {
    return &map<Cast<std::uint32_t>, std::uint32_t, std::uint64_t>;
  }
  return nullptr;
}

void decode_cvt(Decoder& d) {
  const int integral = d.take_one_of({"rni", "rzi", "rmi", "rpi"});
  const int rounding = d.take_one_of({"rn", "rz", "rm", "rp", "rna"});
  const bool saturated = d.take("sat"), flush = d.take("ftz"), relu = d.take("relu");
  const Type to = d.take_type(), from = d.take_type();
  if (to == Type::kBF16x2 || to == Type::kF16x2) {
    if (from != Type::kF32 || rounding != 0) d.fail("this conversion is not supported");
    for (const std::size_t index : {0, 1, 2}) d.source(index, 4);
    if (to == Type::kBF16x2) {
      d.instruction.handler = relu ? &map<PackHalves<BFloat, true>, Pair<BFloat>, float, float>
                                   : &map<PackHalves<BFloat, false>, Pair<BFloat>, float, float>;
    } else {
      d.instruction.handler = relu ? &map<PackHalves<Half, true>, Pair<Half>, float, float>
                                   : &map<PackHalves<Half, false>, Pair<Half>, float, float>;
    }
    return;
  }
  if (relu || bytes_of(to) == 0 || bytes_of(from) == 0 || bytes_of(to) > 8) d.fail("this conversion is not supported");
  if (to == Type::kTF32 && rounding != 4) d.fail("only .rna is supported for .tf32");
  if (to != Type::kTF32 && rounding == 4) d.fail(".rna is only supported for .tf32");
  if (to == Type::kF16 && rounding > 0) d.fail("only .rn is supported for .f16");
  if (to == Type::kF64 && rounding > 0) d.fail("only .rn is supported for .f64");
  d.place_any_width(d.operand(0), bytes_of(to));
  d.place_any_width(d.operand(1), bytes_of(from));
  const bool plain = integral < 0 && rounding <= 0 && !saturated && !flush;
  if (plain && d.operand(0).width == bytes_of(to) && d.operand(1).width == bytes_of(from)) {
    d.instruction.handler = common_conversion(to, from);
  }
  if (d.instruction.handler != nullptr) return;
  d.instruction.handler = &convert;
  d.instruction.option = {static_cast<int>(to), static_cast<int>(from), integral + 1, rounding + 1, saturated, flush};
}

}  // namespace

bool decode_conversion(Decoder& d) {
  if (d.is("mov")) return decode_move(d), true;
  if (d.is("cvt")) return decode_cvt(d), true;
  return false;
}

}  // namespace emulator
