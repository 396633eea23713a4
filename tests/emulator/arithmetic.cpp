// Arithmetic and logic: instructions whose lanes know nothing of each other.
#include "operations.h"
#include "rows.h"

namespace emulator {
namespace {

// ---- choosing instances of `map`

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

template <int kArity, typename F>
void set_integer(Decoder& d, Type type) {
  const int bytes = bytes_of(type);
  for (int index = 0; index <= kArity; ++index) d.source(index, bytes);
  Handler& handler = d.instruction.handler;
  switch (type) {
    case Type::kS16:
      handler = Repeat<std::int16_t, kArity>::template kHandler<F>;
      return;
    case Type::kU16:
    case Type::kB16:
      handler = Repeat<std::uint16_t, kArity>::template kHandler<F>;
      return;
    case Type::kS32:
      handler = Repeat<std::int32_t, kArity>::template kHandler<F>;
      return;
    case Type::kU32:
    case Type::kB32:
      handler = Repeat<std::uint32_t, kArity>::template kHandler<F>;
      return;
    case Type::kS64:
      handler = Repeat<std::int64_t, kArity>::template kHandler<F>;
      return;
    case Type::kU64:
    case Type::kB64:
      handler = Repeat<std::uint64_t, kArity>::template kHandler<F>;
      return;
    default:
      d.fail("this type is not supported here");
  }
}

template <int kArity, typename F, typename T>
Handler float_instance(bool flush, bool saturate) {
  using Instance = Repeat<T, kArity>;
  if (flush && saturate) return Instance::template kHandler<Modified<F, true, true>>;
  if (flush) return Instance::template kHandler<Modified<F, true, false>>;
  if (saturate) return Instance::template kHandler<Modified<F, false, true>>;
  return Instance::template kHandler<Modified<F, false, false>>;
}

// add, sub, mul, fma, min, max, abs, neg, ex2, tanh: the operations that exist in half precision too.
template <int kArity, typename F>
void set_float(Decoder& d, Type type) {
  const bool flush = d.take("ftz"), saturated = d.take("sat");
  for (int index = 0; index <= kArity; ++index) d.source(index, bytes_of(type));
  Handler& handler = d.instruction.handler;
  switch (type) {
    case Type::kF32:
      handler = float_instance<kArity, F, float>(flush, saturated);
      return;
    case Type::kF64:
      handler = float_instance<kArity, F, double>(flush, saturated);
      return;
    case Type::kF16:
      handler = float_instance<kArity, F, Half>(flush, saturated);
      return;
    case Type::kBF16:
      handler = float_instance<kArity, F, BFloat>(flush, saturated);
      return;
    case Type::kF16x2:
      handler = float_instance<kArity, F, Pair<Half>>(flush, saturated);
      return;
    case Type::kBF16x2:
      handler = float_instance<kArity, F, Pair<BFloat>>(flush, saturated);
      return;
    default:
      d.fail("this type is not supported here");
  }
}

// Functions of float32 only.
template <typename F>
void set_float32(Decoder& d, Type type) {
  if (type != Type::kF32) d.fail("this type is not supported here");
  const bool flush = d.take("ftz");
  for (int index = 0; index < 2; ++index) d.source(index, 4);
  d.instruction.handler = float_instance<1, F, float>(flush, false);
}

template <int kArity, typename F>
void set_real(Decoder& d, Type type) {
  const bool flush = d.take("ftz");
  for (int index = 0; index <= kArity; ++index) d.source(index, bytes_of(type));
  if (type == Type::kF32) {
    d.instruction.handler = float_instance<kArity, F, float>(flush, false);
  } else if (type == Type::kF64) {
    d.instruction.handler = float_instance<kArity, F, double>(flush, false);
  } else {
    d.fail("this type is not supported here");
  }
}

// With a rounding mode; only float32 has other ones than the nearest.
template <int kArity, typename F, typename Long>
void set_rounded(Decoder& d, Type type) {
  const int mode = d.take_one_of({"rn", "rz", "rm", "rp"});
  if (mode <= 0) return set_float<kArity, F>(d, type);
  if (type != Type::kF32 || d.take("ftz")) d.fail("this rounding mode is only supported for .f32 without .ftz");
  for (int index = 0; index <= kArity; ++index) d.source(index, 4);
  using Instance = Repeat<float, kArity>;
  d.instruction.handler = mode == 1   ? Instance::template kHandler<Directed<Long, Rounding::kZero>>
                          : mode == 2 ? Instance::template kHandler<Directed<Long, Rounding::kDown>>
                                      : Instance::template kHandler<Directed<Long, Rounding::kUp>>;
}

// ---- choosing by opcode

void decode_multiply(Decoder& d, bool add) {
  const Type probe = d.take_type();
  if (is_float(probe)) {
    if (add) return set_rounded<3, FusedMultiplyAdd, LongMultiplyAdd>(d, probe);
    return set_rounded<2, FloatMultiply, FloatMultiply>(d, probe);
  }
  const int part = d.take_one_of({"lo", "hi", "wide"});
  if (part == 0) return add ? set_integer<3, MultiplyAdd>(d, probe) : set_integer<2, Multiply>(d, probe);
  if (part == 1) return add ? set_integer<3, MultiplyHighAdd>(d, probe) : set_integer<2, MultiplyHigh>(d, probe);
  if (part != 2) d.fail("one of .lo, .hi, .wide is needed");
  const int bytes = bytes_of(probe);
  d.source(0, 2 * bytes);
  d.source(1, bytes);
  d.source(2, bytes);
  if (add) d.source(3, 2 * bytes);
  using I16 = std::int16_t;
  using U16 = std::uint16_t;
  using I32 = std::int32_t;
  using U32 = std::uint32_t;
  using I64 = std::int64_t;
  using U64 = std::uint64_t;
  Handler& handler = d.instruction.handler;
  switch (probe) {
    case Type::kS16:
      handler = add ? &map<MultiplyWideAdd, I32, I16, I16, I32> : &map<MultiplyWide, I32, I16, I16>;
      return;
    case Type::kU16:
      handler = add ? &map<MultiplyWideAdd, U32, U16, U16, U32> : &map<MultiplyWide, U32, U16, U16>;
      return;
    case Type::kS32:
      handler = add ? &map<MultiplyWideAdd, I64, I32, I32, I64> : &map<MultiplyWide, I64, I32, I32>;
      return;
    case Type::kU32:
      handler = add ? &map<MultiplyWideAdd, U64, U32, U32, U64> : &map<MultiplyWide, U64, U32, U32>;
      return;
    default:
      d.fail("this type is not supported here");
  }
}

void decode_shift(Decoder& d) {
  const Type type = d.take_type();
  const bool left = d.is("shl");
  d.source(0, bytes_of(type));
  d.source(1, bytes_of(type));
  d.source(2, 4);
  using U32 = std::uint32_t;
  Handler& handler = d.instruction.handler;
  switch (type) {
    case Type::kS16:
      handler = &map<ShiftRight, std::int16_t, std::int16_t, U32>;
      break;
    case Type::kS32:
      handler = &map<ShiftRight, std::int32_t, std::int32_t, U32>;
      break;
    case Type::kS64:
      handler = &map<ShiftRight, std::int64_t, std::int64_t, U32>;
      break;
    case Type::kU16:
    case Type::kB16:
      handler = left ? &map<ShiftLeft, std::uint16_t, std::uint16_t, U32>
                     : &map<ShiftRight, std::uint16_t, std::uint16_t, U32>;
      break;
    case Type::kU32:
    case Type::kB32:
      handler = left ? &map<ShiftLeft, U32, U32, U32> : &map<ShiftRight, U32, U32, U32>;
      break;
    case Type::kU64:
    case Type::kB64:
      handler = left ? &map<ShiftLeft, std::uint64_t, std::uint64_t, U32>
                     : &map<ShiftRight, std::uint64_t, std::uint64_t, U32>;
      break;
    default:
      d.fail("this type is not supported here");
  }
}

void decode_minimum(Decoder& d, bool minimum) {
  const Type type = d.take_type();
  if (!is_float(type)) return minimum ? set_integer<2, Minimum>(d, type) : set_integer<2, Maximum>(d, type);
  if (d.take("NaN"))
    return minimum ? set_float<2, FloatMinimum<true>>(d, type) : set_float<2, FloatMaximum<true>>(d, type);
  return minimum ? set_float<2, FloatMinimum<false>>(d, type) : set_float<2, FloatMaximum<false>>(d, type);
}

void decode_bit_field(Decoder& d) {
  const Type type = d.take_type();
  const int bytes = bytes_of(type);
  const bool insert = d.is("bfi");
  d.source(0, bytes);
  d.source(1, bytes);
  if (insert) d.source(2, bytes);
  d.source(insert ? 3 : 2, 4);
  d.source(insert ? 4 : 3, 4);
  using U32 = std::uint32_t;
  using U64 = std::uint64_t;
  using I32 = std::int32_t;
  using I64 = std::int64_t;
  Handler& handler = d.instruction.handler;
  if (insert) {
    handler =
        bytes == 4 ? &map<BitFieldInsert, U32, U32, U32, U32, U32> : &map<BitFieldInsert, U64, U64, U64, U32, U32>;
  } else if (is_signed(type)) {
    handler = bytes == 4 ? &map<BitFieldExtract, I32, I32, U32, U32> : &map<BitFieldExtract, I64, I64, U32, U32>;
  } else {
    handler = bytes == 4 ? &map<BitFieldExtract, U32, U32, U32, U32> : &map<BitFieldExtract, U64, U64, U32, U32>;
  }
}

template <typename F>
void set_bit_count(Decoder& d) {
  const Type type = d.take_type();
  d.source(0, 4);
  d.source(1, bytes_of(type));
  d.instruction.handler =
      bytes_of(type) == 8 ? &map<F, std::uint32_t, std::uint64_t> : &map<F, std::uint32_t, std::uint32_t>;
}

void decode_funnel_shift(Decoder& d) {
  const bool left = d.take_one_of({"l", "r"}) == 0;
  const bool wrap = d.take_one_of({"wrap", "clamp"}) == 0;
  d.take_type();
  for (const std::size_t index : {0, 1, 2, 3}) d.source(index, 4);
  Handler& handler = d.instruction.handler;
  if (left) {
    handler = wrap ? Repeat<std::uint32_t, 3>::kHandler<FunnelShift<true, true>>
                   : Repeat<std::uint32_t, 3>::kHandler<FunnelShift<true, false>>;
  } else {
    handler = wrap ? Repeat<std::uint32_t, 3>::kHandler<FunnelShift<false, true>>
                   : Repeat<std::uint32_t, 3>::kHandler<FunnelShift<false, false>>;
  }
}

// div, rcp, sqrt, rsqrt: approximate and full-range forms are computed exactly, other roundings are refused.
void take_accuracy(Decoder& d) {
  if (d.take_one_of({"approx", "full", "rn"}) < 0) d.fail("this rounding mode is not supported here");
}

}  // namespace

bool decode_arithmetic(Decoder& d) {
  if (d.is("mul")) return decode_multiply(d, false), true;
  if (d.is("mad") || d.is("fma")) return decode_multiply(d, true), true;
  if (d.is("min") || d.is("max")) return decode_minimum(d, d.is("min")), true;
  if (d.is("shl") || d.is("shr")) return decode_shift(d), true;
  if (d.is("shf")) return decode_funnel_shift(d), true;
  if (d.is("bfe") || d.is("bfi")) return decode_bit_field(d), true;
  if (d.is("popc")) return set_bit_count<PopulationCount>(d), true;
  if (d.is("clz")) return set_bit_count<LeadingZeros>(d), true;

  const std::string& opcode = d.opcode();
  const bool known = opcode == "add" || opcode == "sub" || opcode == "div" || opcode == "rem" || opcode == "abs" ||
                     opcode == "neg" || opcode == "not" || opcode == "and" || opcode == "or" || opcode == "xor" ||
                     opcode == "cnot" || opcode == "lop3" || opcode == "prmt" || opcode == "brev" ||
                     opcode == "bfind" || opcode == "mul24" || opcode == "copysign" || opcode == "ex2" ||
                     opcode == "lg2" || opcode == "rcp" || opcode == "sqrt" || opcode == "rsqrt" || opcode == "sin" ||
                     opcode == "cos" || opcode == "tanh";
  if (!known) return false;
  if (opcode == "rcp" || opcode == "sqrt" || opcode == "rsqrt") take_accuracy(d);
  if (opcode == "ex2" || opcode == "lg2" || opcode == "sin" || opcode == "cos" || opcode == "tanh") d.take("approx");
  const Type type = d.take_type();
  using U32 = std::uint32_t;
  if (opcode == "add") {
    is_float(type) ? set_rounded<2, FloatAdd, FloatAdd>(d, type) : set_integer<2, Add>(d, type);
  } else if (opcode == "sub") {
    is_float(type) ? set_rounded<2, FloatSubtract, FloatSubtract>(d, type) : set_integer<2, Subtract>(d, type);
  } else if (opcode == "div") {
    if (is_float(type)) take_accuracy(d);
    is_float(type) ? set_real<2, FloatDivide>(d, type) : set_integer<2, Divide>(d, type);
  } else if (opcode == "rem") {
    set_integer<2, Remainder>(d, type);
  } else if (opcode == "abs") {
    is_float(type) ? set_float<1, FloatAbsolute>(d, type) : set_integer<1, Absolute>(d, type);
  } else if (opcode == "neg") {
    is_float(type) ? set_float<1, FloatNegate>(d, type) : set_integer<1, Negate>(d, type);
  } else if (opcode == "and") {
    set_integer<2, And>(d, type);
  } else if (opcode == "or") {
    set_integer<2, Or>(d, type);
  } else if (opcode == "xor") {
    set_integer<2, Xor>(d, type);
  } else if (opcode == "not") {
    set_integer<1, Not>(d, type);
  } else if (opcode == "cnot") {
    set_integer<1, LogicalNot>(d, type);
  } else if (opcode == "lop3") {
    for (const std::size_t index : {0, 1, 2, 3, 4}) d.source(index, 4);
    d.instruction.handler = &map<Logic3, U32, U32, U32, U32, U32>;
  } else if (opcode == "prmt") {
    set_integer<3, Permute>(d, type);
  } else if (opcode == "brev") {
    if (bytes_of(type) == 8) d.source(0, 8), d.source(1, 8);
    if (bytes_of(type) == 4) d.source(0, 4), d.source(1, 4);
    d.instruction.handler =
        bytes_of(type) == 8 ? &map<ReverseBits, std::uint64_t, std::uint64_t> : &map<ReverseBits, U32, U32>;
  } else if (opcode == "bfind") {
    const bool shift = d.take("shiftamt");
    d.source(0, 4);
    d.source(1, bytes_of(type));
    const auto find = [&](auto value) {
      using T = decltype(value);
      d.instruction.handler = shift ? &map<ShiftToHighest, U32, T> : &map<FindHighest, U32, T>;
    };
    if (type == Type::kU32) find(std::uint32_t{});
    if (type == Type::kS32) find(std::int32_t{});
    if (type == Type::kU64) find(std::uint64_t{});
    if (type == Type::kS64) find(std::int64_t{});
  } else if (opcode == "mul24") {
    if (!d.take("lo")) d.fail("only .lo is supported");
    for (const std::size_t index : {0, 1, 2}) d.source(index, 4);
    d.instruction.handler =
        type == Type::kS32 ? Repeat<std::int32_t, 2>::kHandler<Multiply24> : Repeat<U32, 2>::kHandler<Multiply24>;
  } else if (opcode == "copysign") {
    set_real<2, CopySign>(d, type);
  } else if (opcode == "ex2") {
    set_float<1, ExponentialBase2>(d, type);
  } else if (opcode == "lg2") {
    set_float32<LogarithmBase2>(d, type);
  } else if (opcode == "rcp") {
    set_real<1, Reciprocal>(d, type);
  } else if (opcode == "sqrt") {
    set_real<1, SquareRoot>(d, type);
  } else if (opcode == "rsqrt") {
    set_real<1, ReciprocalSquareRoot>(d, type);
  } else if (opcode == "sin") {
    set_float32<Sine>(d, type);
  } else if (opcode == "cos") {
    set_float32<Cosine>(d, type);
  } else if (opcode == "tanh") {
    set_float<1, HyperbolicTangent>(d, type);
  }
  return true;
}

}  // namespace emulator
