// Arithmetic and logic: instructions whose lanes do not depend on each other.
//
// The table at the end names, for every opcode, the setter of the handler for an integer type and for a floating-point
// type. A setter takes the modifiers of its form and sets the widths of the operands.
#include <type_traits>

#include "operations.h"
#include "rows.h"

namespace emulator {
namespace {

// `map` with a result and kArity operands of one type.
template <typename T, int kArity>
struct Repeat;
template <typename T>
struct Repeat<T, 1> {
  template <typename F>
  static constexpr Handler kHandler = &map<F, T, T>;
};
template <typename T>
struct Repeat<T, 2> {
  template <typename F>
  static constexpr Handler kHandler = &map<F, T, T, T>;
};
template <typename T>
struct Repeat<T, 3> {
  template <typename F>
  static constexpr Handler kHandler = &map<F, T, T, T, T>;
};

[[noreturn]] void fail_type(const Decoder& d) { d.fail("this type is not supported here"); }

// ---- integers

// set(value of the type)
template <typename G>
void with_integer(Decoder& d, Type type, G&& set) {
  switch (type) {
    case Type::kS16:
      return set(std::int16_t{});
    case Type::kU16:
    case Type::kB16:
      return set(std::uint16_t{});
    case Type::kS32:
      return set(std::int32_t{});
    case Type::kU32:
    case Type::kB32:
      return set(std::uint32_t{});
    case Type::kS64:
      return set(std::int64_t{});
    case Type::kU64:
    case Type::kB64:
      return set(std::uint64_t{});
    default:
      fail_type(d);
  }
}

template <int kArity, typename F>
void set_integer(Decoder& d, Type type) {
  for (int index = 0; index <= kArity; ++index) d.source(index, bytes_of(type));
  with_integer(d, type,
               [&](auto value) { d.instruction.handler = Repeat<decltype(value), kArity>::template kHandler<F>; });
}

// Pairs of 16-bit integers, on 9.0 and later.
template <typename F, typename T>
struct InHalves {
  std::uint32_t operator()(std::uint32_t a, std::uint32_t b) const {
    std::uint32_t result = 0;
    for (const int shift : {0, 16}) {
      result |= std::uint32_t{static_cast<std::uint16_t>(F()(static_cast<T>(a >> shift), static_cast<T>(b >> shift)))}
                << shift;
    }
    return result;
  }
};
template <typename F>
void set_integer_or_pair(Decoder& d, Type type) {
  if (type != Type::kS16x2 && type != Type::kU16x2) return set_integer<2, F>(d, type);
  for (const std::size_t index : {0, 1, 2}) d.source(index, 4);
  d.instruction.handler = type == Type::kS16x2 ? Repeat<std::uint32_t, 2>::kHandler<InHalves<F, std::int16_t>>
                                               : Repeat<std::uint32_t, 2>::kHandler<InHalves<F, std::uint16_t>>;
}

// max and min of integers; with relu a negative result becomes 0 (on 9.0 and later, for .s32).
template <typename F>
struct Relu {
  std::int32_t operator()(std::int32_t a, std::int32_t b) const { return std::max(F()(a, b), 0); }
};
template <typename F>
void set_integer_extremum(Decoder& d, Type type) {
  const bool relu = d.take("relu");
  if (relu && type != Type::kS32) fail_type(d);
  set_integer_or_pair<F>(d, type);
  if (relu) d.instruction.handler = Repeat<std::int32_t, 2>::kHandler<Relu<F>>;
}

// mul and mad: the low or the high half of the product, or all of it, in a result of twice the width.
template <bool kAdd, typename T, typename Wide>
constexpr Handler kMultiplyWide = &map<MultiplyWide, Wide, T, T>;
template <typename T, typename Wide>
constexpr Handler kMultiplyWide<true, T, Wide> = &map<MultiplyWideAdd, Wide, T, T, Wide>;

template <bool kAdd>
void set_multiply(Decoder& d, Type type) {
  constexpr int kArity = kAdd ? 3 : 2;
  const int part = d.take_one_of({"lo", "hi", "wide"});
  if (part == 0) return set_integer<kArity, std::conditional_t<kAdd, MultiplyAdd, Multiply>>(d, type);
  if (part == 1) return set_integer<kArity, std::conditional_t<kAdd, MultiplyHighAdd, MultiplyHigh>>(d, type);
  if (part < 0) d.fail("one of .lo, .hi, .wide is needed");
  d.source(0, 2 * bytes_of(type));
  d.source(1, bytes_of(type));
  d.source(2, bytes_of(type));
  if (kAdd) d.source(3, 2 * bytes_of(type));
  Handler& handler = d.instruction.handler;
  if (type == Type::kS16) handler = kMultiplyWide<kAdd, std::int16_t, std::int32_t>;
  if (type == Type::kU16) handler = kMultiplyWide<kAdd, std::uint16_t, std::uint32_t>;
  if (type == Type::kS32) handler = kMultiplyWide<kAdd, std::int32_t, std::int64_t>;
  if (type == Type::kU32) handler = kMultiplyWide<kAdd, std::uint32_t, std::uint64_t>;
  if (handler == nullptr) fail_type(d);
}

void set_multiply24(Decoder& d, Type type) {
  if (!d.take("lo")) d.fail("only .lo is supported");
  for (const std::size_t index : {0, 1, 2}) d.source(index, 4);
  if (type == Type::kS32) d.instruction.handler = Repeat<std::int32_t, 2>::kHandler<Multiply24>;
  if (type == Type::kU32) d.instruction.handler = Repeat<std::uint32_t, 2>::kHandler<Multiply24>;
  if (d.instruction.handler == nullptr) fail_type(d);
}

// Shift amounts, positions and lengths have 32 bits whatever the type.
template <typename F>
void set_shift(Decoder& d, Type type) {
  for (const std::size_t index : {0, 1}) d.source(index, bytes_of(type));
  d.source(2, 4);
  with_integer(d, type, [&](auto value) {
    using T = decltype(value);
    d.instruction.handler = &map<F, T, T, std::uint32_t>;
  });
}

void set_bit_field_extract(Decoder& d, Type type) {
  for (const std::size_t index : {0, 1}) d.source(index, bytes_of(type));
  for (const std::size_t index : {2, 3}) d.source(index, 4);
  with_integer(d, type, [&](auto value) {
    using T = decltype(value);
    d.instruction.handler = &map<BitFieldExtract, T, T, std::uint32_t, std::uint32_t>;
  });
}

void set_bit_field_insert(Decoder& d, Type type) {
  for (const std::size_t index : {0, 1, 2}) d.source(index, bytes_of(type));
  for (const std::size_t index : {3, 4}) d.source(index, 4);
  with_integer(d, type, [&](auto value) {
    using T = decltype(value);
    d.instruction.handler = &map<BitFieldInsert, T, T, T, std::uint32_t, std::uint32_t>;
  });
}

template <bool kLeft>
void set_funnel_shift(Decoder& d) {
  const int overflow = d.take_one_of({"wrap", "clamp"});
  for (const std::size_t index : {0, 1, 2, 3}) d.source(index, 4);
  d.instruction.handler = overflow == 0 ? Repeat<std::uint32_t, 3>::kHandler<FunnelShift<kLeft, true>>
                                        : Repeat<std::uint32_t, 3>::kHandler<FunnelShift<kLeft, false>>;
}

void set_funnel_shift(Decoder& d, Type) {
  d.take_one_of({"l", "r"}) == 0 ? set_funnel_shift<true>(d) : set_funnel_shift<false>(d);
}

// The result counts bits: it has 32 of them whatever the type.
template <typename F>
void set_bit_count(Decoder& d, Type type) {
  d.source(0, 4);
  d.source(1, bytes_of(type));
  with_integer(d, type, [&](auto value) { d.instruction.handler = &map<F, std::uint32_t, decltype(value)>; });
}

void set_find_highest(Decoder& d, Type type) {
  d.take("shiftamt") ? set_bit_count<ShiftToHighest>(d, type) : set_bit_count<FindHighest>(d, type);
}

void set_logic3(Decoder& d, Type) {
  using U32 = std::uint32_t;
  for (const std::size_t index : {0, 1, 2, 3, 4}) d.source(index, 4);
  d.instruction.handler = &map<Logic3, U32, U32, U32, U32, U32>;
}

void set_permute(Decoder& d, Type) {
  for (const std::size_t index : {0, 1, 2, 3}) d.source(index, 4);
  d.instruction.handler = Repeat<std::uint32_t, 3>::kHandler<Permute>;
}

// ---- floating-point numbers

template <int kArity, typename F, typename T>
Handler modified(bool flush, bool saturate) {
  using Instance = Repeat<T, kArity>;
  if (flush && saturate) return Instance::template kHandler<Modified<F, true, true>>;
  if (flush) return Instance::template kHandler<Modified<F, true, false>>;
  if (saturate) return Instance::template kHandler<Modified<F, false, true>>;
  return Instance::template kHandler<Modified<F, false, false>>;
}

// Operations of float32 and float64 only.
template <int kArity, typename F>
void set_real(Decoder& d, Type type) {
  const bool flush = d.take("ftz");
  for (int index = 0; index <= kArity; ++index) d.source(index, bytes_of(type));
  if (type == Type::kF32) {
    d.instruction.handler = modified<kArity, F, float>(flush, false);
  } else if (type == Type::kF64) {
    d.instruction.handler = modified<kArity, F, double>(flush, false);
  } else {
    fail_type(d);
  }
}

// Operations that exist in half precision too.
template <int kArity, typename F>
void set_float(Decoder& d, Type type) {
  const bool flush = d.take("ftz"), saturated = d.take("sat");
  for (int index = 0; index <= kArity; ++index) d.source(index, bytes_of(type));
  Handler& handler = d.instruction.handler;
  if (type == Type::kF32) handler = modified<kArity, F, float>(flush, saturated);
  if (type == Type::kF64) handler = modified<kArity, F, double>(flush, saturated);
  if (type == Type::kF16) handler = modified<kArity, F, Half>(flush, saturated);
  if (type == Type::kBF16) handler = modified<kArity, F, BFloat>(flush, saturated);
  if (type == Type::kF16x2) handler = modified<kArity, F, Pair<Half>>(flush, saturated);
  if (type == Type::kBF16x2) handler = modified<kArity, F, Pair<BFloat>>(flush, saturated);
  if (handler == nullptr) fail_type(d);
}

// With a rounding mode; only float32 has modes other than to nearest. Long: the operation in higher precision.
template <int kArity, typename F, typename Long>
void set_rounded(Decoder& d, Type type) {
  const int mode = d.take_one_of({"rn", "rz", "rm", "rp"});
  if (mode <= 0) return set_float<kArity, F>(d, type);
  if (type != Type::kF32 || d.take("ftz")) d.fail("this rounding mode is only supported for .f32 without .ftz");
  for (int index = 0; index <= kArity; ++index) d.source(index, 4);
  using Instance = Repeat<float, kArity>;
  Handler& handler = d.instruction.handler;
  if (mode == 1) handler = Instance::template kHandler<Directed<Long, Rounding::kZero>>;
  if (mode == 2) handler = Instance::template kHandler<Directed<Long, Rounding::kDown>>;
  if (mode == 3) handler = Instance::template kHandler<Directed<Long, Rounding::kUp>>;
}

// div, rcp, sqrt, rsqrt: approximate and full-range forms are computed exactly, other roundings are refused.
template <int kArity, typename F>
void set_quotient(Decoder& d, Type type) {
  if (d.take_one_of({"approx", "full", "rn"}) < 0) d.fail("this rounding mode is not supported here");
  set_real<kArity, F>(d, type);
}

// Functions that exist as approximations only.
template <typename F>
void set_function(Decoder& d, Type type) {
  d.take("approx");
  set_float<1, F>(d, type);
}

template <template <bool> class F>
void set_extremum(Decoder& d, Type type) {
  d.take("NaN") ? set_float<2, F<true>>(d, type) : set_float<2, F<false>>(d, type);
}

// ---- opcodes

using Setter = void (*)(Decoder&, Type);
struct Setters {
  Setter integer, floating;  // nullptr: there is no such form
};

const std::map<std::string, Setters> kOpcodes = {
    {"add", {&set_integer_or_pair<Add>, &set_rounded<2, FloatAdd, FloatAdd>}},
    {"sub", {&set_integer<2, Subtract>, &set_rounded<2, FloatSubtract, FloatSubtract>}},
    {"mul", {&set_multiply<false>, &set_rounded<2, FloatMultiply, FloatMultiply>}},
    {"mad", {&set_multiply<true>, &set_rounded<3, FusedMultiplyAdd, LongMultiplyAdd>}},
    {"fma", {nullptr, &set_rounded<3, FusedMultiplyAdd, LongMultiplyAdd>}},
    {"mul24", {&set_multiply24, nullptr}},
    {"div", {&set_integer<2, Divide>, &set_quotient<2, FloatDivide>}},
    {"rem", {&set_integer<2, Remainder>, nullptr}},
    {"abs", {&set_integer<1, Absolute>, &set_float<1, FloatAbsolute>}},
    {"neg", {&set_integer<1, Negate>, &set_float<1, FloatNegate>}},
    {"min", {&set_integer_extremum<Minimum>, &set_extremum<FloatMinimum>}},
    {"max", {&set_integer_extremum<Maximum>, &set_extremum<FloatMaximum>}},
    {"and", {&set_integer<2, And>, nullptr}},
    {"or", {&set_integer<2, Or>, nullptr}},
    {"xor", {&set_integer<2, Xor>, nullptr}},
    {"not", {&set_integer<1, Not>, nullptr}},
    {"cnot", {&set_integer<1, LogicalNot>, nullptr}},
    {"shl", {&set_shift<ShiftLeft>, nullptr}},
    {"shr", {&set_shift<ShiftRight>, nullptr}},
    {"shf", {&set_funnel_shift, nullptr}},
    {"bfe", {&set_bit_field_extract, nullptr}},
    {"bfi", {&set_bit_field_insert, nullptr}},
    {"lop3", {&set_logic3, nullptr}},
    {"prmt", {&set_permute, nullptr}},
    {"brev", {&set_integer<1, ReverseBits>, nullptr}},
    {"popc", {&set_bit_count<PopulationCount>, nullptr}},
    {"clz", {&set_bit_count<LeadingZeros>, nullptr}},
    {"bfind", {&set_find_highest, nullptr}},
    {"copysign", {nullptr, &set_real<2, CopySign>}},
    {"rcp", {nullptr, &set_quotient<1, Reciprocal>}},
    {"sqrt", {nullptr, &set_quotient<1, SquareRoot>}},
    {"rsqrt", {nullptr, &set_quotient<1, ReciprocalSquareRoot>}},
    {"ex2", {nullptr, &set_function<ExponentialBase2>}},
    {"lg2", {nullptr, &set_function<LogarithmBase2>}},
    {"sin", {nullptr, &set_function<Sine>}},
    {"cos", {nullptr, &set_function<Cosine>}},
    {"tanh", {nullptr, &set_function<HyperbolicTangent>}},
};

}  // namespace

bool decode_arithmetic(Decoder& d) {
  const auto found = kOpcodes.find(d.opcode());
  if (found == kOpcodes.end()) return false;
  const Type type = d.take_type();
  const Setter set = is_float(type) ? found->second.floating : found->second.integer;
  if (set == nullptr) fail_type(d);
  set(d, type);
  return true;
}

}  // namespace emulator
