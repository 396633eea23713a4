// Comparisons, predicates, and selection by them.
#include <cmath>
#include <type_traits>

#include "numbers.h"
#include "rows.h"

namespace emulator {
namespace {

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kLo, kLs, kHi, kHs, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };
const std::vector<std::string> kComparisons = {"eq", "ne",  "lt",  "le",  "gt",  "ge",  "lo",  "ls",  "hi",
                                               "hs", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};

template <typename T, int kParts, typename F>
std::uint32_t compare_rows(Execution& x, const Instruction& i, int part, F f) {
  const T* a = x.row<T>(i.operands[1]);
  const T* b = x.row<T>(i.operands[2]);
  std::uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const int at = lane * kParts + part;
    bits |= static_cast<std::uint32_t>(f(a[at], b[at])) << lane;
  }
  return bits;
}

// A bit per lane. The forms with u are true for NaN. A lane has kParts numbers, of which `part` is compared.
template <typename T, int kParts = 1>
std::uint32_t compare(Execution& x, const Instruction& i, int part = 0) {
  switch (i.option[0]) {
    case kEq:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return a == b; });
    case kNe:
      return compare_rows<T, kParts>(x, i, part,
                                     [](T a, T b) { return a < b || a > b || (std::is_integral_v<T> && a != b); });
    case kLt:
    case kLo:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return a < b; });
    case kLe:
    case kLs:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return a <= b; });
    case kGt:
    case kHi:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return a > b; });
    case kGe:
    case kHs:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return a >= b; });
    case kEqu:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return !(a < b || a > b); });
    case kNeu:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return !(a == b); });
    case kLtu:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return !(a >= b); });
    case kLeu:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return !(a > b); });
    case kGtu:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return !(a <= b); });
    case kGeu:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return !(a < b); });
    case kNum:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return a == a && b == b; });
    default:
      return compare_rows<T, kParts>(x, i, part, [](T a, T b) { return a != a || b != b; });
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

// setp p|q, a, b of packed numbers: p compares the lower ones, q the upper ones
template <typename T>
Step set_packed_predicates(Execution& x, const Instruction& i) {
  const std::uint32_t p = compare<T, 2>(x, i, 0), q = compare<T, 2>(x, i, 1);
  x.set_predicate(i.operands[0].elements[0], p);
  x.set_predicate(i.operands[0].elements[1], q);
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
  if (type == Type::kF16x2 || type == Type::kBF16x2) {
    const bool pair = d.operand(0).kind == Operand::Kind::kVector;
    if (d.is("set") || !pair || d.instruction.option[1] >= 0) d.fail("this form is not supported");
    d.instruction.handler = type == Type::kF16x2 ? &set_packed_predicates<Half> : &set_packed_predicates<BFloat>;
    return;
  }
  d.instruction.handler = d.is("set") ? handler_for<SetValues>(d, type) : handler_for<SetPredicates>(d, type);
}

// and, or, xor; option: which
Step combine_predicates(Execution& x, const Instruction& i) {
  x.set_predicate(i.operands[0], combine(i.option[0], x.predicate(i.operands[1]), x.predicate(i.operands[2])));
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
void decode_logic(Decoder& d) {
  d.take("pred");
  d.source(0, 0);
  d.source(1, 0);
  if (d.is("not")) {
    d.instruction.handler = &invert_predicate;
  } else if (d.is("mov")) {
    d.instruction.handler = &move_predicate;
  } else if (d.is("and") || d.is("or") || d.is("xor")) {
    d.source(2, 0);
    d.instruction.option[0] = d.is("and") ? 0 : d.is("or") ? 1 : 2;
    d.instruction.handler = &combine_predicates;
  } else {
    d.fail("not an operation on predicates");
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

}  // namespace

bool decode_predicate(Decoder& d) {
  if (d.is("setp") || d.is("set")) return decode_comparison(d), true;
  if (d.is("selp")) return decode_select(d), true;
  if (d.is("slct")) return decode_select_by_sign(d), true;
  if (d.is("testp")) return decode_test(d), true;
  if (d.has("pred") && (d.is("mov") || d.is("not") || d.is("and") || d.is("or") || d.is("xor"))) {
    return decode_logic(d), true;
  }
  return false;
}

}  // namespace emulator
