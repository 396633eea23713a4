// Arithmetic, logic, comparison and conversion: instructions whose lanes know nothing of each other.
//
// Each operation is a function object on the value of one lane; `map` applies it to whole rows. Lanes that do not take
// part are computed too (every operation is defined for all values) and dropped when the row is stored.
#include <algorithm>
#include <type_traits>

#include "decode.h"
#include "numbers.h"

namespace emulator {
namespace {

template <typename F, typename R, typename... A, std::size_t... kIndex>
void map_rows(Execution& x, const Instruction& i, std::index_sequence<kIndex...>) {
  alignas(64) R result[kLanes];
  const F f{};
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = f(x.row<A>(i.operands[kIndex + 1])[lane]...);
  x.store(i.operands[0], result);
}

// operand 0 = F(operands 1, 2, ...)
template <typename F, typename R, typename... A>
Step map(Execution& x, const Instruction& i) {
  map_rows<F, R, A...>(x, i, std::index_sequence_for<A...>{});
  return Step::kNext;
}

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
struct BitFieldExtract {
  template <typename T>
  T operator()(T a, std::uint32_t position, std::uint32_t length) const {
    constexpr std::uint32_t kBits = 8 * sizeof(T);
    position &= 255;
    length &= 255;
    if (length == 0) return 0;
    const std::uint32_t last = std::min(position + length, kBits) - 1;  // bit that fills the rest, if signed
    const bool sign = std::is_signed_v<T> && (a >> last & 1);
    const T field = ShiftRight()(a, position);
    if (position >= kBits) return sign ? T(-1) : T(0);
    if (length >= kBits) return field;
    const T mask = T(T(1) << length) - 1;
    return sign && last < position + length
               ? T((field & mask) | ~ShiftRight()(static_cast<std::make_unsigned_t<T>>(mask), 0))
               : T(field & mask);
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
    return __builtin_popcountll(a);
  }
};
struct LeadingZeros {
  std::uint32_t operator()(std::uint32_t a) const { return a == 0 ? 32 : __builtin_clz(a); }
  std::uint32_t operator()(std::uint64_t a) const { return a == 0 ? 64 : __builtin_clzll(a); }
};
struct ReverseBits {
  template <typename T>
  T operator()(T a) const {
    T result = 0;
    for (std::size_t bit = 0; bit < 8 * sizeof(T); ++bit) result |= (a >> bit & 1) << (8 * sizeof(T) - 1 - bit);
    return result;
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

// How far the highest bit is from the top: what the shift to bring it there needs.
struct ShiftToHighest {
  template <typename T>
  std::uint32_t operator()(T value) const {
    const std::uint32_t position = FindHighest()(value);
    return position == ~0u ? position : 8 * sizeof(T) - 1 - position;
  }
};

// ---- operations on floating-point numbers

struct FusedMultiplyAdd {
  float operator()(float a, float b, float c) const { return std::fma(a, b, c); }
  double operator()(double a, double b, double c) const { return std::fma(a, b, c); }
  template <typename T>
  T operator()(T a, T b, T c) const {
    return T(std::fma(double(float(a)), double(float(b)), double(float(c))));
  }
};
struct FloatAdd {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a + b);
  }
};
struct FloatSubtract {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a - b);
  }
};
struct FloatMultiply {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a * b);
  }
};
struct FloatDivide {
  template <typename T>
  T operator()(T a, T b) const {
    return T(a / b);
  }
};
// NaN loses against a number unless .NaN is given; -0 is less than +0.
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
// The approximations of the devices have errors of a few units in the last place; here they are exact.
struct ExponentialBase2 {
  template <typename T>
  T operator()(T a) const {
    return T(std::exp2(static_cast<float>(a)));
  }
};
struct LogarithmBase2 {
  float operator()(float a) const { return std::log2(a); }
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
  float operator()(float a) const { return std::sin(a); }
};
struct Cosine {
  float operator()(float a) const { return std::cos(a); }
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

// .rz, .rm, .rp of float32. A sum of products of floats fits the 64 bits of a long double but for extreme exponents.
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

bool is_float(Type type) {
  return type == Type::kF16 || type == Type::kBF16 || type == Type::kF32 || type == Type::kF64 ||
         type == Type::kF16x2 || type == Type::kBF16x2;
}

// ---- predicates

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kLo, kLs, kHi, kHs, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
const std::vector<std::string> kComparisons = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                                               "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

template <typename T, typename F>
std::uint32_t compare_rows(Execution& x, const Instruction& i, std::size_t first, F f) {
  const T* a = x.row<T>(i.operands[first]);
  const T* b = x.row<T>(i.operands[first + 1]);
  std::uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<std::uint32_t>(f(a[lane], b[lane])) << lane;
  return bits;
}

// A bit per lane. The forms with u are true for NaN.
template <typename T>
std::uint32_t compare(Execution& x, const Instruction& i) {
  switch (i.option[0]) {
    case kEq:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a == b; });
    case kNe:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a < b || a > b || (std::is_integral_v<T> && a != b); });
    case kLt:
    case kLo:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a < b; });
    case kLe:
    case kLs:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a <= b; });
    case kGt:
    case kHi:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a > b; });
    case kGe:
    case kHs:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a >= b; });
    case kEqu:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return !(a < b || a > b); });
    case kNeu:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return !(a == b); });
    case kLtu:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return !(a >= b); });
    case kLeu:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return !(a > b); });
    case kGtu:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return !(a <= b); });
    case kGeu:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return !(a < b); });
    case kNum:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a == a && b == b; });
    default:
      return compare_rows<T>(x, i, 1, [](T a, T b) { return a != a || b != b; });
  }
}

std::uint32_t combine(int operation, std::uint32_t a, std::uint32_t b) {
  return operation == 0 ? a & b : operation == 1 ? a | b : a ^ b;
}

// setp p|q, a, b, c: p = (a ? b) op c, q = !(a ? b) op c; option: comparison, op (-1: no c)
template <typename T>
Step set_predicates(Execution& x, const Instruction& i) {
  std::uint32_t p = compare<T>(x, i), q = ~p;
  if (i.option[1] >= 0) {
    const std::uint32_t c = x.predicate(i.operands[3]);
    p = combine(i.option[1], p, c);
    q = combine(i.option[1], q, c);
  }
  if (i.operands[0].kind == Operand::Kind::kVector) {
    x.set_predicate(i.operands[0].elements[0], p);
    x.set_predicate(i.operands[0].elements[1], q);
  } else {
    x.set_predicate(i.operands[0], p);
  }
  return Step::kNext;
}

// set d, a, b: all ones, or 1.0 if option 2, where the comparison holds
template <typename T>
Step set_values(Execution& x, const Instruction& i) {
  const std::uint32_t bits = compare<T>(x, i);
  alignas(64) std::uint32_t result[kLanes];
  const std::uint32_t truth = i.option[2] ? bits_as<std::uint32_t>(1.0f) : kAllLanes;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = bits >> lane & 1 ? truth : 0;
  x.store(i.operands[0], result);
  return Step::kNext;
}

template <template <typename> class Choice>
Handler handler_for(Decoder& d, Type type) {
  switch (type) {
    case Type::kS16:
      return Choice<std::int16_t>::kHandler;
    case Type::kU16:
    case Type::kB16:
      return Choice<std::uint16_t>::kHandler;
    case Type::kS32:
      return Choice<std::int32_t>::kHandler;
    case Type::kU32:
    case Type::kB32:
      return Choice<std::uint32_t>::kHandler;
    case Type::kS64:
      return Choice<std::int64_t>::kHandler;
    case Type::kU64:
    case Type::kB64:
      return Choice<std::uint64_t>::kHandler;
    case Type::kF16:
      return Choice<Half>::kHandler;
    case Type::kBF16:
      return Choice<BFloat>::kHandler;
    case Type::kF32:
      return Choice<float>::kHandler;
    case Type::kF64:
      return Choice<double>::kHandler;
    default:
      d.fail("this type is not supported here");
  }
}
template <typename T>
struct SetPredicates {
  static constexpr Handler kHandler = &set_predicates<T>;
};
template <typename T>
struct SetValues {
  static constexpr Handler kHandler = &set_values<T>;
};

void decode_comparison(Decoder& d) {
  d.instruction.option[0] = d.take_one_of(kComparisons);
  if (d.instruction.option[0] < 0) d.fail("unknown comparison");
  d.instruction.option[1] = d.take_one_of({"and", "or", "xor"});
  // Flushing subnormal numbers could change the result of a comparison between two of them only.
  d.take("ftz");
  Type result = Type::kPred;
  if (d.is("set")) result = d.take_type();
  const Type type = d.take_type();
  if (d.is("setp") && d.operand(0).kind == Operand::Kind::kVector) {
    for (Operand& element : d.operand(0).elements) d.place(element, 0);
  } else {
    d.source(0, d.is("setp") ? 0 : 4);
  }
  d.source(1, bytes_of(type));
  d.source(2, bytes_of(type));
  if (d.instruction.option[1] >= 0) d.source(3, 0);
  if (d.is("set") && (bytes_of(result) != 4 || d.instruction.option[1] >= 0)) d.fail("this form is not supported");
  d.instruction.option[2] = result == Type::kF32;
  d.instruction.handler = d.is("set") ? handler_for<SetValues>(d, type) : handler_for<SetPredicates>(d, type);
}

template <int kOperation>
Step combine_predicates(Execution& x, const Instruction& i) {
  x.set_predicate(i.operands[0], combine(kOperation, x.predicate(i.operands[1]), x.predicate(i.operands[2])));
  return Step::kNext;
}
Step invert_predicate(Execution& x, const Instruction& i) {
  x.set_predicate(i.operands[0], ~x.predicate(i.operands[1]));
  return Step::kNext;
}
Step move_predicate(Execution& x, const Instruction& i) {
  x.set_predicate(i.operands[0], x.predicate(i.operands[1]));
  return Step::kNext;
}

// selp d, a, b, p
template <typename T>
Step select(Execution& x, const Instruction& i) {
  alignas(64) T result[kLanes];
  const T* a = x.row<T>(i.operands[1]);
  const T* b = x.row<T>(i.operands[2]);
  const std::uint32_t p = x.predicate(i.operands[3]);
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = p >> lane & 1 ? a[lane] : b[lane];
  x.store(i.operands[0], result);
  return Step::kNext;
}

// slct d, a, b, c: a where c >= 0
template <typename T, typename C>
struct SelectBySign {
  T operator()(T a, T b, C c) const { return c >= 0 ? a : b; }
};

struct IsFinite {
  template <typename T>
  bool operator()(T a) const {
    return std::isfinite(a);
  }
};
struct IsInfinite {
  template <typename T>
  bool operator()(T a) const {
    return std::isinf(a);
  }
};
struct IsNan {
  template <typename T>
  bool operator()(T a) const {
    return std::isnan(a);
  }
};
struct IsNumber {
  template <typename T>
  bool operator()(T a) const {
    return !std::isnan(a);
  }
};
struct IsNormal {
  template <typename T>
  bool operator()(T a) const {
    return std::isnormal(a);
  }
};
struct IsSubnormal {
  template <typename T>
  bool operator()(T a) const {
    return std::fpclassify(a) == FP_SUBNORMAL;
  }
};

template <typename F, typename T>
Step test_property(Execution& x, const Instruction& i) {
  const T* a = x.row<T>(i.operands[1]);
  std::uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<std::uint32_t>(F()(a[lane])) << lane;
  x.set_predicate(i.operands[0], bits);
  return Step::kNext;
}

template <typename F>
Handler property_of(Type type) {
  return type == Type::kF64 ? &test_property<F, double> : &test_property<F, float>;
}

// ---- mov, with packing and unpacking of registers

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
  if (type == Type::kPred) {
    d.source(0, 0);
    d.source(1, 0);
    d.instruction.handler = &move_predicate;
    return;
  }
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

bool is_signed(Type type) {
  return type == Type::kS8 || type == Type::kS16 || type == Type::kS32 || type == Type::kS64;
}

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

// To an integer type; out of range: its end, NaN: zero.
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

// The conversions that inner loops are full of, without the detours of `convert`.
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

void decode_conversion(Decoder& d) {
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

void decode_logic(Decoder& d, int operation) {
  const Type type = d.take_type();
  if (type != Type::kPred) {
    if (operation == 0) return set_integer<2, And>(d, type);
    if (operation == 1) return set_integer<2, Or>(d, type);
    return set_integer<2, Xor>(d, type);
  }
  for (const std::size_t index : {0, 1, 2}) d.source(index, 0);
  d.instruction.handler = operation == 0   ? &combine_predicates<0>
                          : operation == 1 ? &combine_predicates<1>
                                           : &combine_predicates<2>;
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

void decode_select(Decoder& d) {
  const Type type = d.take_type();
  const int bytes = bytes_of(type);
  for (const std::size_t index : {0, 1, 2}) d.source(index, bytes);
  d.source(3, 0);
  d.instruction.handler = bytes == 2   ? &select<std::uint16_t>
                          : bytes == 4 ? &select<std::uint32_t>
                                       : &select<std::uint64_t>;
}

void decode_select_by_sign(Decoder& d) {
  d.take("ftz");  // the sign of a subnormal number does not matter: -0 counts as >= 0, and so would the number flushed
  const Type type = d.take_type(), condition = d.take_type();
  if (bytes_of(type) != 4) d.fail("this width is not supported here");
  for (const std::size_t index : {0, 1, 2, 3}) d.source(index, 4);
  using U32 = std::uint32_t;
  d.instruction.handler = condition == Type::kF32 ? &map<SelectBySign<U32, float>, U32, U32, U32, float>
                                                  : &map<SelectBySign<U32, std::int32_t>, U32, U32, U32, std::int32_t>;
}

void decode_test(Decoder& d) {
  const int property = d.take_one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const Type type = d.take_type();
  d.source(0, 0);
  d.source(1, bytes_of(type));
  const Handler handlers[] = {property_of<IsFinite>(type), property_of<IsInfinite>(type),
                              property_of<IsNumber>(type), property_of<IsNan>(type),
                              property_of<IsNormal>(type), property_of<IsSubnormal>(type)};
  if (property < 0) d.fail("unknown property");
  d.instruction.handler = handlers[property];
}

// div, rcp, sqrt, rsqrt: approximate and full-range forms are computed exactly, other roundings are refused.
void take_accuracy(Decoder& d) {
  if (d.take_one_of({"approx", "full", "rn"}) < 0) d.fail("this rounding mode is not supported here");
}

}  // namespace

bool decode_arithmetic(Decoder& d) {
  if (d.is("mov")) return decode_move(d), true;
  if (d.is("cvt")) return decode_conversion(d), true;
  if (d.is("setp") || d.is("set")) return decode_comparison(d), true;
  if (d.is("selp")) return decode_select(d), true;
  if (d.is("slct")) return decode_select_by_sign(d), true;
  if (d.is("testp")) return decode_test(d), true;
  if (d.is("mul")) return decode_multiply(d, false), true;
  if (d.is("mad") || d.is("fma")) return decode_multiply(d, true), true;
  if (d.is("min") || d.is("max")) return decode_minimum(d, d.is("min")), true;
  if (d.is("and")) return decode_logic(d, 0), true;
  if (d.is("or")) return decode_logic(d, 1), true;
  if (d.is("xor")) return decode_logic(d, 2), true;
  if (d.is("shl") || d.is("shr")) return decode_shift(d), true;
  if (d.is("shf")) return decode_funnel_shift(d), true;
  if (d.is("bfe") || d.is("bfi")) return decode_bit_field(d), true;
  if (d.is("popc")) return set_bit_count<PopulationCount>(d), true;
  if (d.is("clz")) return set_bit_count<LeadingZeros>(d), true;

  const std::string& opcode = d.opcode();
  const bool known = opcode == "add" || opcode == "sub" || opcode == "div" || opcode == "rem" || opcode == "abs" ||
                     opcode == "neg" || opcode == "not" || opcode == "cnot" || opcode == "lop3" || opcode == "prmt" ||
                     opcode == "brev" || opcode == "bfind" || opcode == "mul24" || opcode == "copysign" ||
                     opcode == "ex2" || opcode == "lg2" || opcode == "rcp" || opcode == "sqrt" || opcode == "rsqrt" ||
                     opcode == "sin" || opcode == "cos" || opcode == "tanh";
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
  } else if (opcode == "not" && type == Type::kPred) {
    d.source(0, 0);
    d.source(1, 0);
    d.instruction.handler = &invert_predicate;
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
